"""Every optimisation of the streaming step gives the plain network's velocity."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise

import pytest
import torch
from no_host_reads import NoHostReads

from streamdit.config import DiTConfig
from streamdit.errors import UserError
from streamdit.flow import guided_velocity
from streamdit.model import StreamDiT, packed, prepared
from streamdit.model.fast import (
    _STREAMS_IN_USE,
    FLOAT8_CAPABILITY,
    POOL_STREAMS,
    FastConfig,
    FastVelocity,
)
from streamdit.model.prepared import ALIGNMENT, Signals, TextMemories
from streamdit.model.quantise import (
    ERROR_BOUND,
    Float8Linear,
    quantise_rows,
    with_float8_linears,
)
from streamdit.partition import PartitionScheme
from streamdit.text import TextStates

TOLERANCE = 1e-5
"""Relative error in float32: the same sums, some of them in another order."""

SHAPE = (3, 8, 12)
LENGTHS = {"long": 7, "short": 2}
CAPACITY = 12


def model_for(modulation="zero", seed=3, width=SHAPE[2]) -> StreamDiT:
    config = DiTConfig.model_validate(
        {
            "latent_channels": SHAPE[0],
            "buckets": [{"frames": 4, "height": 8, "width": width, "window": [2, 2, 3]}],
            "width": 32,
            "depth": 3,
            "heads": 2,
            "ffn_width": 48,
            "modulation": modulation,
            "text": {"long": 5, "short": 6},
            "time_frequencies": 16,
        }
    )
    model = StreamDiT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


def prompt(seed, batch=1, lengths=LENGTHS, padded=False):
    generator = torch.Generator().manual_seed(seed)
    states = {}
    for (name, length), width in zip(lengths.items(), (5, 6), strict=True):
        mask = torch.ones(batch, length, dtype=torch.bool)
        if padded:
            mask[0, -1] = False
        states[name] = (torch.randn(batch, length, width, generator=generator), mask)
    return TextStates(states)


def schedule() -> torch.Tensor:
    """Levels of a uniform filling and of a staircase with two micro steps, `[rows, 4]`."""
    uniform = PartitionScheme(K=0, N=1, c=4, s=4)
    staircase = PartitionScheme(K=0, N=2, c=2, s=2)
    rows = [uniform.levels(m) for m in range(4)] + [staircase.levels(m) for m in range(2)]
    return torch.stack(rows)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


SWITCHES = {
    "rotary tables alone": FastConfig(modulation_table=False, text_memory=False),
    "modulation table": FastConfig(text_memory=False),
    "text memory": FastConfig(modulation_table=False),
    "both": FastConfig(),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("modulation", ["zero", "single"])
def test_each_switch_gives_the_plain_velocity_at_every_step(switch, guidance, modulation):
    model, levels = model_for(modulation), schedule()
    fast = FastVelocity(model, levels, SHAPE, 2, guidance, SWITCHES[switch])
    text, null = prompt(1, batch=2, padded=True), prompt(2, lengths={"long": 3, "short": 1})
    fast.set_text(text, null)
    generator = torch.Generator().manual_seed(0)
    for row in [0, 1, 2, 3, 4, 5, 4, 5]:
        latents = torch.randn(2, 4, *SHAPE, generator=generator)
        with torch.no_grad():
            tau = levels[row].expand(2, -1)
            expected = guided_velocity(model, latents, tau, text, null, guidance)
        assert relative_error(fast(latents, row), expected) < TOLERANCE


def test_a_new_prompt_takes_effect_at_the_next_step_whatever_its_length():
    model, levels = model_for(), schedule()
    latents = torch.randn(1, 4, *SHAPE)
    fast = FastVelocity(model, levels, SHAPE)
    for lengths in ({"long": 7, "short": 2}, {"long": 2, "short": 1}, {"long": 9, "short": 3}):
        text = prompt(sum(lengths.values()), lengths=lengths)
        fast.set_text(text)
        with torch.no_grad():
            expected = model(latents, levels[4][None], text)
        assert relative_error(fast(latents, 4), expected) < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
def test_memories_of_fixed_size_stay_in_place_and_mask_what_a_prompt_does_not_use(padded):
    model, levels = model_for(), schedule()
    latents = torch.randn(1, 4, *SHAPE)
    fast = FastVelocity(model, levels, SHAPE)
    fast._memories = TextMemories(model, CAPACITY)
    places = set()
    # A shorter prompt comes after a longer one, so that stale entries would show.
    for seed, lengths in enumerate(({"long": 9, "short": 3}, {"long": 2, "short": 1})):
        text = prompt(seed, lengths=lengths, padded=padded and lengths["short"] > 1)
        fast.set_text(text)
        memory = fast._memories.of_block(1)
        assert memory.key.shape[2] == ALIGNMENT  # the next multiple
        places.add((memory.key.data_ptr(), memory.value.data_ptr(), memory.mask.data_ptr()))
        with torch.no_grad():
            expected = model(latents, levels[4][None], text)
        assert relative_error(fast(latents, 4), expected) < TOLERANCE
    assert len(places) == 1


def attention_by_prompt(query, key, value, query_ends, key_ends, longest_query, longest_key):
    """What PyTorch's attention to sequences of many lengths computes, one sequence at a time."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    query_ends, key_ends = query_ends.tolist(), key_ends.tolist()
    assert max(b - a for a, b in pairwise(query_ends)) <= longest_query
    assert max(b - a for a, b in pairwise(key_ends)) <= longest_key
    rows = []
    for mine, theirs in zip(pairwise(query_ends), pairwise(key_ends), strict=True):
        q, k, v = query[slice(*mine)], key[slice(*theirs)], value[slice(*theirs)]
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v))
    return torch.cat(rows)


def packed_or_padded(model, packed):
    """How a padded prompt is kept."""
    config = FastConfig(packed_text=packed)
    memories = FastVelocity(model, schedule(), SHAPE, config=config)._memories
    with torch.no_grad():
        memories.set(model.project_text(prompt(1, padded=True)))
    return memories._text


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_text_without_its_padding_gives_the_plain_velocity(monkeypatch, static, guidance):
    """On GPUs; here with attention written out in place of the kernel."""
    monkeypatch.setattr(packed, "varlen_attn", attention_by_prompt)
    monkeypatch.setattr(prepared, "can_pack", lambda device, dtype, head_width: True)
    model, levels = model_for(), schedule()
    fast = FastVelocity(model, levels, SHAPE, 2, guidance)
    assert isinstance(packed_or_padded(model, packed=False), prepared.PaddedText)
    assert isinstance(packed_or_padded(model, packed=True), packed.PackedText)
    fast._memories = TextMemories(model, CAPACITY if static else None)
    null = prompt(9, lengths={"long": 3, "short": 1})
    places = set()
    # A shorter prompt comes after a longer one, so that stale entries would show.
    for seed, lengths in enumerate(({"long": 9, "short": 3}, {"long": 4, "short": 2})):
        text = prompt(seed, batch=2, lengths=lengths, padded=True)
        fast.set_text(text, null)
        memory = fast._memories.of_block(1)
        places.add((memory.key.data_ptr(), memory.value.data_ptr(), memory.ends.data_ptr()))
        real = sum(mask.sum(dim=1) for _, mask in text.values())
        rows = [*real.tolist(), *([4, 4] if guidance != 1.0 else [])]
        assert memory.ends.tolist() == [0, *accumulate(rows)]
        latents = torch.randn(2, 4, *SHAPE)
        with torch.no_grad():
            tau = levels[4].expand(2, -1)
            expected = guided_velocity(model, latents, tau, text, null, guidance)
        assert relative_error(fast(latents, 4), expected) < TOLERANCE
    assert len(places) == 1 or not static


def test_text_is_packed_only_where_there_is_a_kernel_for_it():
    assert not packed.can_pack(torch.device("cpu"), torch.bfloat16, 64)
    assert callable(packed.varlen_attn)


def test_a_prompt_longer_than_the_memory_is_refused_with_the_remedy():
    memories = TextMemories(model_for(), capacity=4)
    with pytest.raises(UserError, match=r"9 text tokens .* room for 4; .* raise text_tokens"):
        memories.set(model_for().project_text(prompt(0)))


def test_the_table_has_a_row_per_distinct_time_and_holds_float32():
    model, levels = model_for().bfloat16(), schedule()
    signals = Signals(model, levels)
    times = levels.unique()
    assert len(times) == 4  # filling and staircase meet the same quarters
    blocks, output = signals._table
    assert blocks.shape == (4, 3, 6, 32)
    assert output.shape == (4, 2, 32)
    assert {blocks.dtype, output.dtype} == {torch.float32}
    assert signals.nbytes == 4 * (3 * 6 + 2) * 32 * 4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_step_reads_no_tensor_on_the_host(guidance):
    fast = FastVelocity(model_for(), schedule(), SHAPE, 1, guidance)
    fast.set_text(prompt(1), prompt(2))
    latents = torch.randn(1, 4, *SHAPE)
    with NoHostReads():
        for row in (0, 4, 5, 4):
            latents = latents + 0.1 * fast(latents, row)
    with NoHostReads(), pytest.raises(AssertionError, match="reads a tensor on the host"):
        bool(latents.sum() > 0)


def test_rounding_rows_to_float8_keeps_zeros_and_three_bits_of_mantissa():
    rows = torch.randn(16, 64) * torch.logspace(-6, 6, 16)[:, None]
    rows[3] = 0
    rounded, scale = quantise_rows(rows)
    error = (rounded.float() * scale - rows).abs()
    # Half a unit in the last place of a normal number; below those, of the smallest one.
    assert torch.all(error <= rows.abs() / 16 + scale * 2**-10)
    assert torch.all(rounded[3].float() == 0)


def test_float8_linear_equals_the_product_of_its_rounded_operands():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).bfloat16()
    x = torch.randn(2, 5, 64).bfloat16()
    with torch.no_grad():
        found = Float8Linear(linear)(x).double()
        weight, weight_scale = quantise_rows(linear.weight)
        rows, scale = quantise_rows(x.flatten(0, 1))
        exact = (rows.double() * scale) @ (weight.double() * weight_scale).T + linear.bias.double()
    assert relative_error(found.flatten(0, 1), exact) < 4e-3  # the output is bf16


def test_float8_blocks_share_the_other_weights_and_stay_within_the_stated_error():
    model, levels = model_for().bfloat16(), schedule()
    rounded = with_float8_linears(model)
    assert with_float8_linears(model) is rounded  # all streams of a model share it
    assert rounded.patch_embedding.weight is model.patch_embedding.weight
    assert isinstance(rounded.blocks[0].text_attention.to_key_value, torch.nn.Linear)
    assert isinstance(rounded.blocks[2].ffn[2], Float8Linear)
    assert isinstance(model.blocks[2].ffn[2], torch.nn.Linear)
    text, latents = prompt(1), torch.randn(1, 4, *SHAPE)
    fast = FastVelocity(model, levels, SHAPE, config=FastConfig(float8=True))
    fast.set_text(text)
    with torch.no_grad():
        expected = model(latents, levels[4][None], text)
    error = relative_error(fast(latents, 4), expected)
    assert 0 < error < ERROR_BOUND


def test_float8_blocks_are_released_with_their_model():
    model = model_for()
    rounded = weakref.ref(with_float8_linears(model))
    del model
    gc.collect()
    assert rounded() is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph needs a CUDA device, but the stream runs on cpu"),
        ({"cuda_graph": True, "text_memory": False}, "set text_memory: true, or cuda_graph: false"),
    ],
)
def test_what_the_device_cannot_do_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        FastVelocity(model_for(), schedule(), SHAPE, config=FastConfig(**config))


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_preferred_attention_kernel_changes_nothing_but_rounding(kernel):
    model, levels = model_for(), schedule()
    fast = FastVelocity(model, levels, SHAPE, config=FastConfig(attention=kernel))
    text, latents = prompt(1, padded=True), torch.randn(1, 4, *SHAPE)
    fast.set_text(text)
    with torch.no_grad():
        expected = model(latents, levels[4][None], text)
    assert relative_error(fast(latents, 4), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["auto", "cudnn"])
def test_compiled_blocks_give_the_plain_velocity_and_are_compiled_twice_whatever_the_depth(kernel):
    """Once for regular and once for shifted windows; new prompts and streams compile nothing."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, levels = model_for(), schedule()
    config = FastConfig(compile=True, attention=kernel)
    for _ in range(2):
        fast = FastVelocity(model, levels, SHAPE, config=config, max_text_tokens=CAPACITY)
        for seed, lengths in enumerate(({"long": 7, "short": 2}, {"long": 2, "short": 1})):
            text = prompt(seed, lengths=lengths)
            fast.set_text(text)
            for row in (0, 4, 5):
                latents = torch.randn(1, 4, *SHAPE)
                with torch.no_grad():
                    expected = model(latents, levels[row][None], text)
                assert relative_error(fast(latents, row), expected) < TOLERANCE
    # Beside the two kinds of block: the way in and the way out.
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("in_threads", [False, True])
def test_one_process_serves_more_batch_sizes_than_pytorch_compiles_by_default(
    monkeypatch, in_threads
):
    compile_with_inductor = torch.compile

    def compile_eagerly(function, mode=None, **options):
        return compile_with_inductor(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    torch._dynamo.reset()
    model, levels = model_for(), schedule()
    sizes = range(1, 7)  # twice as many versions of a block, for its two kinds of windows
    assert 2 * len(sizes) > 8  # PyTorch's own limit

    def serve(batch):
        config = FastConfig(compile=True)
        fast = FastVelocity(model, levels, SHAPE, batch, config=config, max_text_tokens=CAPACITY)
        text, latents = prompt(batch, batch), torch.randn(batch, 4, *SHAPE)
        fast.set_text(text)
        with torch.no_grad():
            expected = model(latents, levels[4].expand(batch, -1), text)
        if not in_threads:
            return relative_error(fast(latents, 4), expected)
        # As a server steps its streams; a thread has settings of torch.compile of its own.
        with ThreadPoolExecutor(1) as thread:
            return relative_error(thread.submit(fast, latents, 4).result(), expected)

    for batch in sizes:
        assert serve(batch) < TOLERANCE


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_float8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < FLOAT8_CAPABILITY,
    reason="needs a CUDA device of compute capability 8.9 or more",
)

BFLOAT16 = 0.01
"""Relative error in bf16, where fused code rounds in other places."""

GPU_SWITCHES = {
    "graph": (FastConfig(cuda_graph=True), BFLOAT16),
    "graph, padded text": (FastConfig(cuda_graph=True, packed_text=False), BFLOAT16),
    "compiled": (FastConfig(compile=True), BFLOAT16),
    "compiled graph": (FastConfig(cuda_graph=True, compile=True), BFLOAT16),
    "compiled graph, cuDNN attention": (
        FastConfig(cuda_graph=True, compile=True, attention="cudnn"),
        BFLOAT16,
    ),
}
FLOAT8_SWITCHES = {
    "float8": FastConfig(float8=True),
    "float8 graph": FastConfig(float8=True, cuda_graph=True),
    "float8 compiled": FastConfig(float8=True, compile=True),
    "float8 compiled graph": FastConfig(float8=True, cuda_graph=True, compile=True),
}


def check_on_device(
    config, tolerance, guidance, dtype=torch.bfloat16, device="cuda", width=SHAPE[2]
):
    """Every step's velocity is the plain one, for two prompts, without waiting for the device."""
    model, levels = model_for(width=width).to(device, dtype), schedule().to(device)
    shape = (*SHAPE[:2], width)
    fast = FastVelocity(model, levels, shape, 1, guidance, config, CAPACITY)
    null = prompt(9, lengths={"long": 3, "short": 1}).to(device)
    latents = torch.randn(1, 4, *shape, device=device)
    for seed in (1, 2):
        text = prompt(seed, padded=seed == 2).to(device)
        fast.set_text(text, null)
        fast(latents, 0)
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [fast(latents, row).clone() for row in range(len(levels))]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for row, velocity in enumerate(found):
            with torch.no_grad():
                expected = guided_velocity(model, latents, levels[row][None], text, null, guidance)
            assert relative_error(velocity, expected) < tolerance


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("switch", GPU_SWITCHES)
def test_a_step_on_the_device_gives_the_plain_velocity_without_waiting_for_it(switch, guidance):
    config, tolerance = GPU_SWITCHES[switch]
    check_on_device(config, tolerance, guidance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("switch", GPU_SWITCHES)
def test_a_step_of_many_tokens_takes_the_kernels_that_large_models_take(switch):
    """Attention to packed text has another kernel from 129 tokens on, in some versions."""
    config, tolerance = GPU_SWITCHES[switch]
    check_on_device(config, tolerance, 3.0, width=24)


@pytest.mark.gpu
@needs_gpu
def test_more_graphs_than_pytorch_has_streams_are_refused_and_a_dropped_one_makes_room():
    model, levels = model_for().bfloat16().cuda(), schedule().cuda()
    latents, text = torch.randn(1, 4, *SHAPE, device="cuda"), prompt(1).to("cuda")

    def captured():
        fast = FastVelocity(
            model, levels, SHAPE, config=FastConfig(cuda_graph=True), max_text_tokens=CAPACITY
        )
        fast.set_text(text)
        return fast, fast(latents, 4).clone()

    streams = [captured() for _ in range(POOL_STREAMS - len(_STREAMS_IN_USE))]
    with pytest.raises(UserError, match="replay CUDA graphs already"):
        captured()
    expected = streams[0][1]
    gc.disable()
    try:
        del streams[5:]
        streams.append(captured())
    finally:
        gc.enable()
    for fast, _ in streams:
        assert torch.equal(fast(latents, 4), expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_captured_step_in_float32_changes_nothing_but_the_order_of_sums(guidance):
    check_on_device(FastConfig(cuda_graph=True), TOLERANCE, guidance, torch.float32)


@pytest.mark.gpu
@needs_float8
@pytest.mark.parametrize("switch", FLOAT8_SWITCHES)
def test_float8_steps_stay_within_the_stated_error_compiled_and_captured(switch):
    check_on_device(FLOAT8_SWITCHES[switch], ERROR_BOUND, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_steps_are_captured_on_every_device_of_a_process():
    for device in ("cuda:0", "cuda:1"):
        check_on_device(FastConfig(cuda_graph=True), BFLOAT16, 3.0, device=device)


@pytest.mark.gpu
@needs_gpu
def test_text_is_packed_on_devices_that_can():
    if torch.cuda.get_device_capability() < packed.CAPABILITY:
        pytest.skip("needs a CUDA device of compute capability 8.0 or more")
    model = model_for().bfloat16().cuda()
    memories = TextMemories(model, CAPACITY)
    with torch.no_grad():
        memories.set(model.project_text(prompt(1).to("cuda")))
    assert isinstance(memories.of_block(0), packed.PackedTextMemory)


@pytest.mark.gpu
@needs_float8
def test_float8_on_the_device_equals_float8_on_the_cpu():
    torch.manual_seed(0)
    layer = Float8Linear(torch.nn.Linear(256, 512).bfloat16())
    x = torch.randn(64, 256).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        found = layer.cuda()(x.cuda()).cpu()
    assert relative_error(found.float(), expected.float()) < 5e-3
