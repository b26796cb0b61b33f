"""The arithmetic of prepared shards: cuts worked out by hand, and ranks that together hold every number once."""

import math

import pytest

from configs.errors import UnusableInput
from teacher.checkpoint.partition import Layout, Part, Rows, Target, Tensor, part_of, targets_of, zero_group

MATRIX = Target("model.layers.0.self_attn.q_b_proj.weight", (6, 4), "columns", (Rows("source", 0, 6),))


def cut(kind: str, shape: tuple[int, ...], layout: Layout, rank: int) -> Part:
    return part_of(Target("x", shape, kind, ()), layout, rank)  # type: ignore[arg-type]


def test_zero_cuts_the_flat_tensor_and_pads_the_last_rank() -> None:
    """15 numbers over 4 ranks: 4, 4, 4 and 3 with one of padding."""
    parts = [cut("whole", (5, 3), Layout(4), rank) for rank in range(4)]
    assert [(part.first, part.last, part.length) for part in parts] == [(0, 4, 4), (4, 8, 4), (8, 12, 4), (12, 15, 4)]


def test_a_rank_may_hold_nothing_but_padding() -> None:
    assert cut("whole", (5,), Layout(4), 3) == Part(0, 5, 0, 1, 5, 5, 2)


def test_column_parallel_cuts_rows_and_zero_cuts_over_the_strided_rest() -> None:
    """4 ranks, 2 to a tensor group: ranks 0 and 2 share the upper half of the rows, 1 and 3 the lower."""
    parts = [cut("columns", (6, 4), Layout(4, tensor=2), rank) for rank in range(4)]
    assert [part[:4] for part in parts] == [(0, 3, 0, 4), (3, 6, 0, 4), (0, 3, 0, 4), (3, 6, 0, 4)]
    assert [(part.first, part.last) for part in parts] == [(0, 6), (0, 6), (6, 12), (6, 12)]


def test_row_parallel_cuts_columns() -> None:
    assert cut("rows", (6, 4), Layout(2, tensor=2), 1)[:4] == (0, 6, 2, 4)


def test_experts_go_to_consecutive_ranks_and_zero_cuts_over_their_replicas() -> None:
    """8 experts of 2 x 3, EP 2 on 4 ranks: ranks 1 and 3 hold experts 4 to 7, half each."""
    assert cut("experts", (8, 2, 3), Layout(4, expert=2), 3) == Part(8, 16, 0, 3, 12, 24, 12)


def test_stage_0_and_buffers_are_whole() -> None:
    assert cut("whole", (5, 3), Layout(4, zero_stage=0), 2)[4:] == (0, 15, 15)
    assert cut("buffer", (8,), Layout(4), 2)[4:] == (0, 8, 8)


def test_uneven_shares_go_to_the_first_ranks() -> None:
    assert [cut("columns", (5, 2), Layout(2, tensor=2), rank)[:2] for rank in (0, 1)] == [(0, 3), (3, 5)]


@pytest.mark.parametrize("kind", ["whole", "replaced", "columns", "rows", "experts"])
@pytest.mark.parametrize("layout", [Layout(4, 2, 2), Layout(4, 4, 2), Layout(8, 2, 4), Layout(6, 3, 2), Layout(2, 1, 2)], ids=str)
def test_together_the_ranks_hold_every_number_equally_often(kind: str, layout: Layout) -> None:
    target = Target("x", (12, 5, 8), kind, ())  # type: ignore[arg-type]
    copies = [0] * math.prod(target.shape)
    for rank in range(layout.world):
        part = part_of(target, layout, rank)
        block = [
            row * target.columns + column
            for row in range(part.row, part.row_end)
            for column in range(part.column, part.column_end)
        ]
        for index in block[part.first : part.last]:
            copies[index] += 1
    slices = {"columns": layout.tensor, "rows": layout.tensor, "experts": layout.expert}.get(kind, 1)
    group, _ = zero_group(kind, layout, 0)  # type: ignore[arg-type]
    assert set(copies) == {layout.world // slices // group}


# --- names ---------------------------------------------------------------------------------------------------------

BLOCK = "model.layers.1.mlp"
SPARSE = [
    Tensor(f"{BLOCK}.experts.gate_up_proj", (2, 6, 4)),
    Tensor(f"{BLOCK}.experts.down_proj", (2, 4, 3)),
    Tensor(f"{BLOCK}.gate.weight", (2, 4)),
    Tensor(f"{BLOCK}.gate.e_score_correction_bias", (2,), True),
]
ONE_BY_ONE = {
    *(f"{BLOCK}.experts.{expert}.{name}_proj.weight" for expert in (0, 1) for name in ("gate", "up", "down")),
    f"{BLOCK}.gate.weight",
    f"{BLOCK}.gate.e_score_correction_bias",
}
FUSED = {tensor.name for tensor in SPARSE}


def found(model_type: str, has: set[str], layout: Layout) -> dict[str, Target]:
    return {target.name.removeprefix(f"{BLOCK}."): target for target in targets_of(model_type, SPARSE, has, layout)}


def test_autoep_keeps_gate_and_up_apart() -> None:
    """Fused rows are expert by expert, gate over up: expert 1's up is rows 9 to 12."""
    targets = found("glm_moe_dsa", FUSED, Layout(2, expert=2))
    assert list(targets) == ["experts.w1", "experts.w3", "experts.w2", "router.gate.weight", "router.e_score_correction_bias"]
    assert targets["experts.w1"].shape == (2, 3, 4) and targets["experts.w1"].cut == "experts"
    assert targets["experts.w3"].sources[1] == Rows(f"{BLOCK}.experts.gate_up_proj", 9, 12)


def test_experts_one_by_one_are_taken_by_name() -> None:
    sources = found("glm_moe_dsa", ONE_BY_ONE, Layout(2, expert=2))["experts.w2"].sources
    assert sources == tuple(Rows(f"{BLOCK}.experts.{expert}.down_proj.weight", 0, 4) for expert in (0, 1))


def test_without_autoep_gate_and_up_alternate_in_one_tensor() -> None:
    target = found("glm_moe_dsa", ONE_BY_ONE, Layout(2))["experts.gate_up_proj"]
    assert target.cut == "whole"
    assert [rows.source.split(".experts.")[1] for rows in target.sources] == [
        "0.gate_proj.weight",
        "0.up_proj.weight",
        "1.gate_proj.weight",
        "1.up_proj.weight",
    ]


def test_mixtral_spells_its_experts_differently() -> None:
    old = BLOCK.replace("mlp", "block_sparse_moe")
    names = {f"{old}.experts.{expert}.{name}.weight" for expert in (0, 1) for name in ("w1", "w2", "w3")}
    targets = found("mixtral", names | {f"{old}.gate.weight", f"{BLOCK}.gate.e_score_correction_bias"}, Layout(2, expert=2))
    assert targets["experts.w3"].sources[0].source == f"{old}.experts.0.w3.weight"
    assert targets["router.gate.weight"].sources[0].source == f"{old}.gate.weight"


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(UnusableInput, match="no model.layers.1.mlp.experts.1.up_proj.weight .1 tensors missing"):
        found("glm_moe_dsa", ONE_BY_ONE - {f"{BLOCK}.experts.1.up_proj.weight"}, Layout(2, expert=2))


def test_tied_embeddings_and_tensor_parallelism_exclude_each_other() -> None:
    with pytest.raises(UnusableInput, match="ties its embeddings"):
        targets_of("glm_moe_dsa", SPARSE, FUSED, Layout(2, tensor=2), tied={"lm_head.weight"})
