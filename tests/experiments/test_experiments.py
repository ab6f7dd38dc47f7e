"""Each experiment from its data to its number, at the smallest size."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.app import app
from experiments import digits, figures, language, translation
from experiments.plots import draw
from experiments.runs import FOLDER, Done, read
from experiments.tables import claims, numbers
from randattn import softmax_attention

TINY = {"features": 16, "heads": 2, "depth": 1, "warm_up": 2}


def silent(*_):
    """No progress."""


def only(runs, **at):
    (run,) = (run for run in runs if all(getattr(run, name) == value for name, value in at.items()))
    return run


@pytest.mark.parametrize("method", digits.MECHANISMS)
@pytest.mark.parametrize("library", digits.LIBRARIES)
def test_digits(library, method):
    if library == "jax" and method not in ("softmax", "lara"):
        pytest.skip("compiles for long; the layer has tests of its own")
    settings = digits.SMALL | TINY | {"epochs": 1, "batch": 256}
    run = only(digits.runs("cpu", settings), library=library, method=method, seed=1)
    found = digits.work(run, silent)
    assert 0 < found["accuracy"] < 0.6
    assert 1.5 < found["loss"] < 3
    if library == "torch":
        assert digits.work(run, silent) == found


def test_the_digits_are_split_once():
    (train, classes), (test, _) = digits.read_digits()
    assert train.shape == (1437, 64)
    assert test.shape == (360, 64)
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}
    assert set(classes) == set(range(10))
    every = np.concatenate(digits.batches(100, 32, np.random.default_rng(0)))
    assert len(every) == len(set(every)) == 96


@pytest.mark.parametrize("method", language.MECHANISMS)
def test_language(method):
    settings = language.SMALL | TINY | {"tokens": 64, "steps": 12, "batch": 4, "tested": 4}
    run = only(language.runs("cpu", settings), method=method, seed=0)
    found = language.work(run, silent)
    # Eight bits tell bytes apart that nothing is known of.
    assert all(3 < found[kind] < 8.5 for kind in language.KINDS)


def test_what_is_tested_on_is_not_trained_on():
    train, tested = language.read_text()
    text = train.tobytes()
    for kind in language.KINDS:
        whole = tested[kind].tobytes()
        assert 10_000 < len(whole) < len(text) / 10
        lines = language.long_lines(whole)
        assert len(lines) > 100
        assert not lines & language.long_lines(text)
        # Not by lines alone: stretches of 60 bytes, wherever they begin.
        stretches = [whole[at : at + 60] for at in range(0, len(whole) - 60, len(whole) // 150)]
        assert sum(stretch in text for stretch in stretches) < 0.05 * len(stretches)


def test_windows_overlap_by_the_byte_that_is_guessed():
    text = np.arange(100, dtype=np.uint8)
    rows = language.windows(text, 10, 99)
    assert rows.shape == (9, 11)
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    assert language.windows(text, 10, 3)[:, 0].tolist() == [0, 40, 80]
    # Spread over all of it where they are not a multiple.
    assert language.windows(text, 10, 5)[-1, 0] == 80


def catalogue(path, messages):
    """A compiled gettext catalogue (the GNU format)."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    pairs = sorted((a.encode(), b.encode()) for a, b in messages.items())
    start, tables, strings = 28 + 16 * len(pairs), [], b""
    for side in (0, 1):
        for pair in pairs:
            tables.append(struct.pack("<2I", len(pair[side]), start + len(strings)))
            strings += pair[side] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, start)
    path.write_bytes(header + b"".join(tables) + strings)


@pytest.fixture
def messages(tmp_path):
    """Numbers told in a language that is nearly German."""
    ones = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
    told = {
        " ".join(words): " ".join(ones[word] for word in words)
        for words in (
            [list(ones)[number // 6**place % 6] for place in range(5)] for number in range(0, 6**5, 3)
        )
    }
    extra = {
        "menu\x04Open the file": "Datei\nöffnen",
        "%d file\0%d files": "%d Datei\0%d Dateien",
        "same": "same",
        "%s": "%s!",
    }
    catalogue(tmp_path / "one.mo", told | extra)
    catalogue(tmp_path / "two.mo", {"ONE one one one one": "noch einmal"})
    (tmp_path / "broken.mo").write_bytes(b"not a catalogue")
    return tmp_path


def test_messages(messages):
    pairs = dict(translation.read_pairs(messages))
    assert pairs["Open the file"] == "Datei öffnen"
    assert "%d file" in pairs
    assert not {"same", "%s", ""} & set(pairs)
    # The same letters are one message, whatever their case.
    assert len({name.lower() for name in pairs}) == len(pairs)
    train, tested = translation.split([*pairs.items(), ("Begin %s now-1", "x"), ("begin %d NOW", "x")])
    assert len(train) > 20 * len(tested) > 0
    for side in (0, 1):
        letters = [{translation._letters(pair[side]) for pair in half} for half in (train, tested)]
        assert not letters[0] & letters[1]


def test_too_few_messages_are_an_error(tmp_path):
    catalogue(tmp_path / "few.mo", {"good morning": "guten Morgen"})
    with pytest.raises(Exception, match="1 German messages, expected 2000 or more"):
        translation.runs("cpu", folder=tmp_path)


@pytest.mark.parametrize("method", translation.MECHANISMS)
def test_translation(messages, method):
    settings = translation.SMALL | TINY
    settings |= {"vocabulary": 300, "steps": 12, "batch": 16, "tested": 16, "least_tokens": 2}
    settings["features"] = 32
    run = only(translation.runs("cpu", settings, messages), method=method, seed=0)
    found = translation.work(run, silent)
    assert found["tested"] == 16
    assert 0 <= found["bleu"] <= 100
    assert 1 < found["loss"] < 10


def test_padding_changes_no_translation():
    import torch

    from experiments.models_torch import Translator

    settings = translation.SMALL | TINY | {"vocabulary": 300}
    torch.manual_seed(0)
    # The landmarks, groups and draws of the others are those of the padded length.
    for method in ("softmax", "rfa"):
        model = Translator(settings, translation.MECHANISMS[method]).eval()
        row = torch.randint(3, 300, (1, 12))
        padded = torch.cat([row, torch.zeros(1, 5, dtype=row.dtype)], dim=1)
        target = torch.tensor([[1, 7, 8]])
        alone, beside = (model.decode(target, *model.encode(one)) for one in (row, padded))
        torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)
        found = translation._translate(model, padded, 9)
        assert [len(one) <= 8 for one in found] == [True]


def test_like_lengths_are_together():
    rng = np.random.default_rng(0)
    rows = [([0] * length,) for length in rng.integers(8, 48, 5000)]
    batches = translation._batches(rows, 64, rng)
    every = np.concatenate(batches)
    assert len(every) == len(set(every)) > 4900
    spread = [np.ptp([len(rows[one][0]) for one in batch]) for batch in batches]
    assert np.median(spread) <= 2


def test_figures():
    settings = figures.SMALL | {
        "heads": 2,
        "features": 8,
        "samples": [8, 64],
        "ra_samples": [1],
        "tokens": 64,
    }
    settings |= {"lengths": [32, 600], "samples_of_lengths": 8, "timed": [64], "rounds": 1}
    model = digits.SMALL | TINY | {"batch": 256}
    del model["epochs"]
    runs = figures.runs("cpu", settings, {"stages": [[4, 1], [8, 1]], "pictures": 2, "model": model})
    found = {
        method: figures.work(only(runs, method=method, seed=0), silent)["points"]
        for method in (*figures.ESTIMATES, figures.MEAN)
    }
    for points in found.values():
        # Of 600 tokens there are no real ones.
        assert {point["tokens"] for point in points if point["inputs"] == figures.TEXT} == {32, 64}
        assert {point["tokens"] for point in points if point["inputs"] == figures.GAUSSIAN} == {32, 64, 600}
    exact = [point["error"] for point in found["eva"] if point["samples"] == 64]
    assert len(exact) == 2
    assert max(exact) < 1e-9
    assert all(0.01 < point["error"] < 20 for point in found["rfa"] + found["lara"] + found[figures.MEAN])
    points = figures.work(only(runs, method=figures.PICTURES, seed=0), silent)["points"]
    assert {point["estimator"] for point in points} == {"softmax", *figures.ESTIMATES, figures.MEAN}
    assert {point["tokens"] for point in points} == {16, 64}
    assert all(0 < point["accuracy"] < 1 for point in points if point["estimator"] == "softmax")
    exact = [point for point in points if point["estimator"] == "eva" and point["samples"] == 64]
    assert max(point["error"] for point in exact) < 1e-9
    costs = figures.work(only(runs, method=figures.COSTS, seed=0), silent)["points"]
    assert {point["estimator"] for point in costs} == {"softmax", "rfa", "ra", "lara", "eva"}
    assert all(point["seconds"] > 0 for point in costs)


def test_what_a_vision_model_attends_to():
    """Attention to what is caught is what its layers pass on."""
    import torch

    from experiments.digits_torch import projected
    from experiments.models_torch import Classifier
    from randattn.integrations._layer import merge_heads

    torch.manual_seed(0)
    model = Classifier(digits.SMALL | TINY | {"depth": 2}, digits.MECHANISMS["softmax"])
    seen = []
    for block in model.stack.blocks:
        block.attention.register_forward_hook(lambda *call: seen.append(call[-1]))
    q, k, v = projected(model, torch.randn(3, 64))
    assert q.shape == k.shape == v.shape == (2, 3, 2, 64, 8)
    out = merge_heads(softmax_attention(q, k, v)).float()
    assert len(seen) == 2
    for layer, block in enumerate(model.stack.blocks):
        with torch.no_grad():
            torch.testing.assert_close(block.attention.out(out[layer]), seen[layer])


def test_places_stay_where_they_are_in_a_larger_picture():
    import torch

    from experiments.digits_torch import resize
    from experiments.models_torch import Classifier

    model = Classifier(digits.SMALL | TINY, digits.MECHANISMS["softmax"])
    with torch.no_grad():
        places = model.stack.places.unflatten(0, (8, 8))
        places[..., 0] = torch.arange(8.0)[:, None]
        places[..., 1] = torch.arange(8.0)
    resize(model, 16)
    down, across = model.stack.places.detach().unflatten(0, (16, 16))[..., :2].unbind(-1)
    # Pixels of half the size, whose middles are a quarter from those of the old; none is beyond the old edges.
    expected = ((torch.arange(16.0) - 0.5) / 2).clip(0, 7)
    torch.testing.assert_close(down, expected[:, None].expand(16, 16))
    torch.testing.assert_close(across, expected.expand(16, 16))
    assert model(torch.zeros(2, 256)).shape == (2, 10)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tables_and_plots_of_figures(device, tmp_path):
    """Also where there are fewer real tokens than others."""
    done = []
    for run in figures.runs(device):
        settings = run.settings
        counts = settings["ra_samples"] if run.method == "ra" else settings["samples"]
        most = 1 if run.method in ("ra", figures.MEAN) else settings["samples_of_lengths"]
        points = _points_of_pictures(run) if run.method == figures.PICTURES else []
        for kind in (figures.GAUSSIAN, figures.TEXT) if not points else ():
            limit = figures.TEXT_TOKENS if kind == figures.TEXT else max(settings["lengths"])
            at = [(figures.tokens_of(kind, settings), count) for count in counts]
            at += [(tokens, most) for tokens in settings["lengths"] if tokens <= limit]
            if run.method == figures.MEAN:
                at = [(tokens, 1) for tokens, _ in at]
            points += [
                {"inputs": kind, "tokens": tokens, "samples": count, "error": 1 / count + 0.01 * run.seed}
                for tokens, count in dict.fromkeys(at)
            ]
        if run.method == figures.COSTS:
            points = [
                {"estimator": name, "tokens": tokens, "seconds": 1.0 + run.seed, "bytes": None}
                for name in ("softmax", *figures.ESTIMATES)
                for tokens in settings["timed"]
            ]
            for point in points:
                point["bytes"] = 100 + run.seed
        done.append(Done(run, {"points": points}, 1.0, {}))
    assert [len(row) for row in claims("figures", done)[1]] == [5] * 14
    assert len(numbers("figures", done)[1]) == 3 * len({*settings["samples"], *settings["ra_samples"]})
    draw("figures", done, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def _points_of_pictures(run):
    seen = [
        {"estimator": "softmax", "inputs": figures.PICTURES, "tokens": side**2, "accuracy": 0.9}
        for side, _ in run.settings["stages"]
    ]
    return seen + [
        {
            "estimator": method,
            "inputs": figures.PICTURES,
            "tokens": side**2,
            "samples": count,
            "error": 1 / count,
        }
        for side, _ in run.settings["stages"]
        for method in (*figures.ESTIMATES, figures.MEAN)
        for count in ([1] if method == figures.MEAN else {*run.settings["samples"], 1})
    ]


@pytest.mark.parametrize("name", ["figures", "digits", "translation", "language"])
def test_a_plot_of_what_is_committed(name, tmp_path):
    path = tmp_path / "plot.png"
    draw(name, read(FOLDER / f"{name}.json"), path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size > 10_000


def test_the_command_goes_on_and_draws(tmp_path):
    """With what is committed nothing is left to run."""
    results = tmp_path / "digits.json"
    results.write_bytes((FOLDER / "digits.json").read_bytes())
    done = CliRunner().invoke(app, ["digits", "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "wrote digits.json and paper-digits.png" in done.output
    assert "to do" not in done.output
    assert results.read_bytes() == (FOLDER / "digits.json").read_bytes()
    assert (tmp_path / "paper-digits.png").stat().st_size > 10_000
