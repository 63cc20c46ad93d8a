"""The report of the demo over seeds: what counts as a win, and that no seed is excluded."""

import json

from benchmarks.learning import demo_seeds


def test_one_seed_without_a_win_fails_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_seeds, "RESULTS", tmp_path / "results")
    for seed in demo_seeds.SEEDS:
        write(tmp_path / f"seed_{seed}", facts_of(seed))
    assert demo_seeds.main(["--folder", str(tmp_path)]) == 0
    write(tmp_path / "seed_3", facts_of(3) | {"is_clear_win": False})
    assert demo_seeds.main(["--folder", str(tmp_path)]) == 1
    text = (tmp_path / "results" / "demo_cpu.md").read_text(encoding="utf-8")
    assert "at 4 of 5 seeds" in text
    assert "| 4 | 0.300 | 0.940 |" in text
    # Accuracies after PPO 0.90 … 0.94: mean 0.92, sd √(0.001 / 4) = 0.016.
    assert "0.920 ± 0.016" in text
    content = json.loads((tmp_path / "results" / "demo_cpu.json").read_text(encoding="utf-8"))
    assert [facts["seed"] for facts in content["seeds"]] == list(demo_seeds.SEEDS)


def test_another_answer_elsewhere_fails_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_seeds, "RESULTS", tmp_path / "results")
    for seed in demo_seeds.SEEDS:
        write(tmp_path / f"seed_{seed}", facts_of(seed) | {"checks": [{"is_alike": seed != 2}]})
    assert demo_seeds.main(["--folder", str(tmp_path)]) == 1


def facts_of(seed: int) -> dict:
    def estimate(mean: float) -> dict:
        return {"mean": mean, "low": mean, "high": mean, "num_units": 100}

    both = {"sft": estimate(0.3), "ppo": estimate(0.9 + seed / 100)}
    names = ("greedy_accuracy", "sampled_accuracy", "canary_accuracy", "length")
    rates = ("greedy_win_rate", "sampled_win_rate", "kl")
    return {
        "seed": seed,
        "is_clear_win": True,
        "reward": {"num_pairs": 500, "num_held_out_pairs": 50, "pair_accuracy": 0.9},
        "results": dict.fromkeys(names, both) | dict.fromkeys(rates, estimate(0.8)),
        "checks": [{"is_alike": True}],
        "timing_s": {"all": 100.0},
    }


def write(folder, facts: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(facts), encoding="utf-8")
