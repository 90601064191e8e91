"""The arithmetic of costs against GPUs that are simulated unit by unit, and the pieces of studies counted by hand."""

import heapq

import hydra
import numpy as np
import pytest
import torch

from entreg.cli import CONFIGS
from entreg.experiments.paper_costs import (
    Experiment,
    Measured,
    Piece,
    cost_tables,
    empty_decoder,
    paper_experiment,
    parameters,
    state_bytes,
)


def simulated(piece, gpus):
    """Units that the busiest GPU has done when each has a clock and units or batches are dealt out one by one."""
    total = 0
    for step in range(piece.rounds):
        left = piece.units // piece.rounds + (step < piece.units % piece.rounds)
        clocks, turn = [0] * gpus, 0
        while left > 0:
            batch = min(piece.together, left)
            clocks[turn % gpus] += batch
            left, turn = left - batch, turn + 1
        # All wait for the slowest.
        total += max(clocks)
    return total


@pytest.mark.parametrize("gpus", [1, 2, 3, 8, 64])
def test_shares_are_those_of_gpus_simulated_unit_by_unit(gpus):
    draw = np.random.default_rng(gpus)
    for _ in range(60):
        units, batch = int(draw.integers(1, 400)), int(draw.integers(2, 40))
        for piece in (Piece("evaluate", "m", None, units, batch), Piece("read", "m", 16, units)):
            assert piece.longest_share(gpus) == simulated(piece, gpus), (units, batch)
        # Steps of equal size, as training takes them.
        steps = int(draw.integers(1, 9))
        piece = Piece("train", "m", "plain", steps * units, rounds=steps)
        assert piece.longest_share(gpus) == simulated(piece, gpus)


def test_runs_that_have_a_gpu_each_are_those_of_a_queue():
    draw = np.random.default_rng(0)
    for gpus in (1, 3, 8):
        sizes = draw.integers(1, 50, 20).tolist()
        study = Experiment("x", [[Piece("read", "m", 16, size)] for size in sizes], 0, 2)
        free = [0.0] * gpus
        for size in sizes:
            heapq.heappush(free, heapq.heappop(free) + 2.0 * size)
        assert study.spread_seconds(lambda piece: 2.0, gpus) == max(free)
        assert study.seconds(lambda piece: 2.0, 1) == 2.0 * sum(sizes)
    assert study.seconds(lambda piece: None, 1) is study.spread_seconds(lambda piece: None, 2) is None


@pytest.fixture(scope="module")
def studies():
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return {name: paper_experiment(name) for name in ("vit/imagenet", "cifar/cifar100", "llm/phi_2")}


def test_studies_hold_the_work_that_their_configurations_ask_for(studies):
    study = studies["vit/imagenet"]
    assert len(study.runs) == 8 * 5
    # As configs/benchmark/training_cost.yaml says.
    assert {piece.units for run in study.runs for piece in run if piece.kind == "train"} == {6_400_000}
    methods = [run[0].variant for run in study.runs[::5]]
    assert methods == [
        "plain",
        "plain",
        "row_entropy",
        "key_entropy",
        "ball",
        "l1_logits",
        "sparse_loop",
        "partition_loop",
    ]
    # Dense, 4 x 4 of setting A, 5 of columns and 5 of tokens, on 1 % of the training images and the 50,000.
    evaluated = [piece.units for piece in study.runs[0] if piece.kind == "evaluate"]
    assert sum(evaluated) == 27 * (12_812 + 50_000)
    # Weights and two moments of 86,567,656 weights in float32, two checkpoints of each run.
    assert study.checkpoint_bytes == 40 * 2 * 12 * 86_567_656
    study = studies["cifar/cifar100"]
    assert len(study.runs) == 6 * 5 + 5
    (base,) = study.runs[-1]
    assert (base.units, base.rounds) == (3900 * 128, 3900)
    images = [piece.units for piece in study.runs[0] if piece.kind == "evaluate" and piece.units == 10_000]
    # Dense and two plans, and 19 corruptions at 5 severities, dense and sparse.
    assert len(images) == 3 + 2 * 19 * 5
    study = studies["llm/phi_2"]
    assert (len(study.runs), study.trained) == (1, 0)
    written = {(piece.variant, piece.units) for piece in study.runs[0] if piece.kind == "write"}
    assert (2048, 200 * 128) in written


def record(experiment, model, rows, gpu="GPU"):
    device = {"gpu": gpu, "cpu": "CPU", "available_cores": 1, "threads": 1, "memory_gib": 1.0}
    return {
        "id": f"{experiment}-{gpu}",
        "experiment": experiment,
        "scale": "paper",
        "device": device,
        "model": {"name": model},
        "config": {"model": model},
        "rows": rows,
    }


VIT = "vit_base_patch16_224"


def test_costs_come_from_records_of_a_gpu_and_say_what_is_missing(studies):
    chosen = [studies["vit/imagenet"]]
    training = [
        {"method": "plain", "seconds_per_image": 0.001},
        {"method": "row_entropy", "seconds_per_image": 0.002},
    ]
    speed = [{"method": "dense", "batch": batch, "seconds": 0.1} for batch in (100, 200, 400)]
    on_cpu = record("benchmark/training_cost", VIT, training, gpu=None)
    table, _ = cost_tables(chosen, [on_cpu])
    assert table.rows[0][3:7] == ["not measured"] * 4
    assert any("benchmark=training_cost benchmark.device=cuda" in note for note in table.notes)
    records = [record("benchmark/training_cost", VIT, training), record("vit/speed", VIT, speed)]
    table, _ = cost_tables(chosen, records)
    assert not any("Not measured" in note for note in table.notes)
    # Seven methods take a thousandth of a second per image, one two; batches of 256 take those of 200 for their pace.
    images = 5 * 6_400_000 * (7 * 0.001 + 0.002) + 40 * 27 * 62_812 * 0.1 / 200
    assert float(table.rows[0][3].replace(",", "")) == pytest.approx(images / 3600, rel=0.01)
    measured = Measured(records)
    assert measured(Piece("train", "other", "plain", 1)) is None
    assert measured(Piece("evaluate", VIT, None, 1, together=50)) is None


def test_language_models_read_and_write_at_the_pace_of_the_next_longer_context():
    def row(phase, context, method="dense", batch=1, **times):
        return {"phase": phase, "context": context, "method": method, "batch": batch, **times}

    rows = [
        row("prefill", 4096, seconds=0.5),
        row("prefill", 2048, seconds=0.2),
        row("prefill", 2048, method="ours", seconds=0.1),
        row("decode", 4096, milliseconds_per_token=20.0),
        row("decode", 4096, batch=8, milliseconds_per_token=5.0),
    ]
    measured = Measured([record("llm/speed", "phi_2", rows)])
    assert measured(Piece("read", "phi_2", 1024, 1)) == 0.2
    assert measured(Piece("read", "phi_2", 4096, 1)) == 0.5
    assert measured(Piece("read", "phi_2", 8192, 1)) is None
    assert measured(Piece("write", "phi_2", 512, 1)) == 0.02
    assert next(iter(measured.used.values()))["gpu"] == "GPU"


def test_studies_with_records_of_a_gpu_are_told_with_their_own_times():
    def run(number, seconds, steps):
        metrics = {"training_steps": steps, "training_seconds": 4.0} if steps else {"training_seconds": 0.0}
        one = record("llm/training", "smollm2", [], gpu="GPU")
        return {**one, "id": str(number), "wall_seconds": seconds, "metrics": metrics, "config": {"trainer": TRAINER}}

    trainer_of_a_cpu = {**record("llm/training", "m", [], gpu=None), "config": {"trainer": TRAINER}}
    records = [run(1, 3600.0, 10), run(2, 1800.0, 30), run(3, 900.0, 0), trainer_of_a_cpu]
    _, table, _ = cost_tables([], records)
    # 10 and 30 steps of 8 in four seconds; on eight GPUs the longest run decides.
    assert table.rows == [["llm/training", "GPU", 3, 40.0, "1.75", "1.00", "1.00"]]


TRAINER = {"batch_size": 8}


def test_weights_are_those_of_the_published_models():
    assert parameters(empty_decoder("llama_2_7b")) == 6_738_415_616
    assert parameters(empty_decoder("mistral_7b")) == 7_241_732_096


def test_memory_of_a_sharded_decoder_is_counted_by_hand():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 11, "hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layer = 4 * 6 * 6 + 3 * 6 * 10 + 2 * 6
    outside = 2 * 11 * 6 + 6
    assert state_bytes(model, 1) == 16 * (3 * layer + outside)
    # Rows of each matrix, rounded up: 6 of 4 GPUs are 2 each, 10 are 3, 11 are 3, and norms of 6 are 2.
    part = 3 * (4 * 2 * 6 + 2 * 3 * 6 + 2 * 10 + 2 * 2) + 2 * 3 * 6 + 2
    assert state_bytes(model, 4) == 16 * part + 4 * (layer + outside)
