"""Multistep distillation: many guided teacher steps become one student step per chunk."""
