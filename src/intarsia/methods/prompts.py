"""Soft prompts beyond prompt and prefix tuning: P-tuning v1 and v2, the zero-gated prefix of LLaMA-Adapter."""

from __future__ import annotations

from intarsia.methods.method import Method, Patch, Policy, row
from intarsia.patches import Attend, Concat, Tokens


@row("p_tuning", equation="[MLP(BiLSTM(E)); E(x)]", source="Liu et al. 2021, arXiv 2103.10385")
def p_tuning(length: int = 20, init: str = "unit", where: str = "auto", ids: tuple[int, ...] = ()) -> Method:
    """Trained embeddings behind an LSTM and an MLP, flattened after training (P-tuning v1).

    The paper puts them into slots of a template; here they stand at the start of the sequence (or behind its first token).
    """
    form = Tokens(length, where, init, ids=ids, reparameterise="lstm")  # type: ignore[arg-type]
    patch = Patch("prompt", "seq", form, Concat(), port="seq")
    return Method("p_tuning", (patch,), Policy(learning_rate=1e-3, flatten=True))


@row("p_tuning_v2", equation="Attn(q, [P_k; K], [P_v; V]) in every layer, P plain", source="Liu et al. 2022, arXiv 2110.07602")
def p_tuning_v2(length: int = 20, dropout: float = 0.1, layers: str | None = None, init: str = "unit", ids: tuple[int, ...] = ()) -> Method:
    """Trained keys and values for every self-attention, without a generating network."""
    form = Attend(length, None, dropout, init, ids=ids)
    return Method("p_tuning_v2", (Patch("prefix", "attn.mem", form, Concat(), port="mem", layers=layers),), Policy(learning_rate=5e-3))


@row("llama_adapter", equation="h' = h + g softmax(q P_k^T) P_v, g = 0 at the start", source="Zhang et al. 2023, arXiv 2303.16199")
def llama_adapter(length: int = 10, layers: str | None = None, dropout: float = 0.0) -> Method:
    """Trained keys and values with a softmax of their own, gated from zero.

    The paper puts them into the upper layers only (`layers="-30:"` of 32) and projects trained tokens with the base's own
    keys and values; here keys and values are trained themselves.
    """
    form = Attend(length, None, dropout, mix="zero_gate")
    return Method("llama_adapter", (Patch("prefix", "attn.mem", form, Concat(), port="mem", layers=layers),), Policy(learning_rate=5e-3))


__all__ = ["llama_adapter", "p_tuning", "p_tuning_v2"]
