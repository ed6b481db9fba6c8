"""What devec says of real adapters and checkpoints. Skipped, with the reason, where the data pack is not at hand."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from statistics import median

import pytest
import torch

import devec
from devec.core.summary import all_findings
from devec.linalg.chance import benjamini_hochberg, edge, pair_p_values
from devec.linalg.lowrank import svd_of_product
from devec.linalg.subspace import pair_spectrum


def folders(pack: Path, family: str) -> list[str]:
    return [str(p) for p in sorted((pack / "adapters" / family).iterdir())]


def codes(d: devec.Decomposition) -> dict[str, str]:
    return {f.code: f.message for f in all_findings(d)}


def test_gpt2_adapters_share_nothing_at_the_papers_threshold_and_much_beyond_chance(data_pack: Path) -> None:
    d = devec.decompose(folders(data_pack, "gpt2"))
    found = codes(d)
    assert len(d.vectors) == 9
    assert "nothing-shared" in found
    for name in ("britter_cls4", "kishrajesh_cls2", "loganlev_cls2"):
        assert name in found["shared-seed"]
    tops = [float(s.eigenvalues[0]) for s in d.spectra.values()]
    assert 0.45 < max(tops) < 0.55
    above = sum(int((s.p_values < 0.01).sum()) for s in d.spectra.values())
    assert above > 0.4 * sum(s.eigenvalues.numel() for s in d.spectra.values())
    assert sum(s.count for s in d.with_view(threshold="chance").spectra.values()) > 1000


def test_edge_cases_are_named(data_pack: Path) -> None:
    pack = folders(data_pack, "edge_cases") + folders(data_pack, "gpt2")[:3]
    found = codes(devec.decompose(pack))
    assert "gpt2_sukhmandhawan_zero_B" in found["zero-vector"]
    assert "gpt2_fegbewunmi_huge_B" in found["norm-outlier"]


def test_near_copies_are_named(data_pack: Path) -> None:
    found = codes(devec.decompose(folders(data_pack, "gemma-3-270m-it")))
    assert "aowei_svg and aowei_svg_seed123" in found["near-duplicate"]
    assert "base-name-differs" in found
    assert "0112ly_logo_qv" in found["missing-module"]


def test_three_key_styles_of_stable_diffusion_meet_under_the_same_names(data_pack: Path) -> None:
    root = data_pack / "adapters" / "stable-diffusion-v1"
    d = devec.decompose([str(root / n) for n in ("wellchn_pokemon", "jettooss_satellite", "edinsl_imva")])
    assert len(d.tensors) == 128
    assert all(len(t.members) == 3 for t in d.tensors.values())


@pytest.mark.parametrize(
    ("family", "kind", "count"),
    [("gpt2", "attn.c_attn", 9), ("distilbert-base-uncased", "q_lin", 4), ("gemma-3-270m-it", "q_proj", 2)],
)
def test_mismatched_layers_come_out_as_chance(data_pack: Path, family: str, kind: str, count: int) -> None:
    """Layer i of one adapter has nothing to do with layer i + 3 of another: a control that costs nothing."""
    vectors = [devec.load(p) for p in folders(data_pack, family)[:count]]
    bases = [
        {n: svd_of_product(v.deltas[n].B, v.deltas[n].A).U for n in v.deltas if kind in n}  # type: ignore[attr-defined]
        for v in vectors
    ]
    names = list(bases[0])

    def pooled(shift: int) -> tuple[torch.Tensor, list[float]]:
        p, over = [], []
        for a, b in combinations(bases, 2):
            for i, n in enumerate(names):
                x, y = a[n], b[names[(i + shift) % len(names)]]
                values = pair_spectrum(x.T @ y).eigenvalues
                p.append(pair_p_values(values, x.shape[1], y.shape[1], x.shape[0]))
                over.append(float(values[0]) / edge(x.shape[1], y.shape[1], x.shape[0]))
        return torch.cat(p), over

    matched, over_matched = pooled(0)
    mismatched, over_mismatched = pooled(3)
    assert int((mismatched <= benjamini_hochberg(mismatched, 0.01)).sum()) == 0
    assert int((matched <= benjamini_hochberg(matched, 0.01)).sum()) > 0.3 * matched.numel()
    assert median(over_mismatched) < 0.95 < 2.0 < median(over_matched)


def test_detectors_against_the_mean_of_themselves(data_pack: Path, tmp_path: Path) -> None:
    from devec.cli.main import run

    files = [str(p) for p in sorted((data_pack / "checkpoints" / "yolov5n").iterdir())]
    base = str(tmp_path / "mean.safetensors")
    heads = r"model\.24\."
    assert run(["merge", "--method", "average", *files, "--exclude", heads, "-o", base, "-q"]) == 0
    pool = devec.decompose(files, base=base, selection=devec.Selection((), (heads,)))
    assert "base-is-mean" in codes(pool)
    assert {t.layout.shape[2:] for t in pool.tensors.values()} >= {(1, 1), (3, 3), (6, 6)}
