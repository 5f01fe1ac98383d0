"""Every optimisation of the streaming step gives the plain network's velocity."""

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise

import pytest
import torch
from fast_step import (
    CAPACITY,
    SHAPE,
    TOLERANCE,
    model_for,
    prompt,
    relative_error,
    schedule,
)
from no_host_reads import NoHostReads

from streamdit.errors import UserError
from streamdit.flow import guided_velocity
from streamdit.model import packed, prepared
from streamdit.model.fast import (
    FastConfig,
    FastVelocity,
)
from streamdit.model.prepared import ALIGNMENT, Signals, TextMemories

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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph needs a CUDA device, but the stream runs on cpu"),
        ({"cuda_graph": True, "text_memory": False}, "set text_memory: true, or cuda_graph: false"),
        ({"autotune": True}, "set compile: true, or autotune: false"),
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


@pytest.mark.slow
def test_compiled_blocks_fuse_norms_with_modulation_windows_and_residuals():
    """Each norm is one kernel with all that stands around it, up to the next matrix product."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    config = FastConfig(compile=True)
    fast = FastVelocity(model_for(), schedule(), SHAPE, config=config, max_text_tokens=CAPACITY)
    fast.set_text(prompt(1))
    _, codes = run_and_get_code(fast, torch.randn(1, 4, *SHAPE), 4)
    named = [set(re.findall(r"(?:cpp|triton)\w*_fused_\w+", code)) for code in codes]
    blocks = [kernels for kernels in named if any("attention" in name for name in kernels)]
    assert len(blocks) == 2  # regular and shifted windows
    for kernels in blocks:
        norms = [name for name in kernels if "native_layer_norm" in name]
        assert len(norms) == 3  # before attention, text attention and feed-forward
        modulated = [name for name in norms if "add" in name and "mul" in name]
        assert len(modulated) == 3
        # Beside them: query and key, the query of text, the activation and the last residual.
        # What attention gives goes into the next product as it lies.
        assert len(kernels) == 7
    (output,) = [kernels for kernels in named if kernels not in blocks and "norm" in str(kernels)]
    assert any(re.search("add_mul_native_layer_norm", name) for name in output)


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
