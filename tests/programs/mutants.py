"""Break the library on purpose, one line at a time: the suite must notice each time.

Run as a program (`nox -s mutants`): it copies the sources, applies one mutant after the other, and
runs the suite on NumPy until the first failure. It fails if a mutant survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SHARED = [
    f"tests/{folder}" for folder in ("average", "tokens", "streaming", "estimators", "study", "tracing")
]


class Mutant(NamedTuple):
    """A line of a source file, and what breaks it."""

    what: str
    file: str
    line: str
    broken: str


MUTANTS = [
    Mutant(
        "RA without kappa",
        "_estimators/ra.py",
        "bias, x.scale).biased()",
        "bias).biased()",
    ),
    Mutant("errors print whole lists", "_core/describe.py", "map(shown, value[:_MOST_PARTS])", "map(shown, value)"),
    Mutant("RA draws no noise", "_estimators/ra.py", "_sample_keys(x, q, u)) + eps", "_sample_keys(x, q, u))"),
    Mutant("RA chooses keys without mass", "_estimators/ra.py", "passed < total", "passed <= total"),
    Mutant(
        "EVA's groups made at every token",
        "_backends/numpy.py",
        "return function(state) if condition else state",
        "return function(state)",
    ),
    Mutant("RFA without log Z", "_estimators/rfa.py", "Keys(w, f, log_z)", "Keys(w, f)"),
    Mutant("RFA leaves the range of V", "_estimators/rfa_features.py", "return xp.minimum(xp.maximum(out, lowest), highest)", "return out"),
    Mutant(
        "LARA without the balance heuristic",
        "_estimators/lara.py",
        "only(present, log_z - log_mixture)",
        "only(present, log_z)",
    ),
    Mutant("LARA's optimal weighting unclamped", "_estimators/lara_weights.py", "_SMALLEST_ALPHA = 1e-8", "_SMALLEST_ALPHA = 1e-1"),
    Mutant("LARA's alpha not centred", "_estimators/lara_weights.py", "t = ops.subtract(t, mean)", "pass"),
    Mutant("a padded query in t", "_estimators/lara.py", "log_mask(x.query_mask, x.q)", "None"),
    Mutant("a landmark of padding has weight", "_estimators/lara_weights.py", "if there is None:\n        return log_weight", "if True:\n        return log_weight"),
    Mutant(
        "masked queries take a landmark's keys away",
        "_estimators/lara.py",
        "(log_queries > -math.inf) | (log_keys",
        "(log_queries > -math.inf) & (log_keys",
    ),
    Mutant("antithetic draws that are not", "_estimators/lara.py", "noises = [eps, -eps]", "noises = [eps, eps]"),
    Mutant(
        "a padded key in a landmark",
        "_tokens/pooling.py",
        "    bias = gather_bias(x, mask, at)\n",
        "    bias = gather_bias(x, None, at)\n",
    ),
    Mutant("cells of pooling one token short", "_tokens/grids.py", "-((i + 1) * -n // size)", "(i + 1) * n // size"),
    Mutant("edges that come back to the wrong device", "_tokens/pooling.py", "xp.roll(x[..., -at.edge :, :], 1, axis=-3)", "xp.roll(x[..., -at.edge :, :], -1, axis=-3)"),
    Mutant("EVA counts the window twice", "_estimators/eva.py", "log_weight = x.xp.where(outside, log_weight, -math.inf)", "pass"),
    Mutant("EVA loses what a window leaves of a group", "_estimators/eva.py", "        rests = [_rests(of_values, of_keys, split.rest, given, group_weight)]\n", ""),
    Mutant("EVA's groups without their size", "_estimators/eva.py", '    if group_weight == "size":\n', "    if False:\n"),
    Mutant("EVA reads padding in its groups", "_estimators/eva.py", "gather_bias(x.k, x.key_mask, at), x.scale)", "gather_bias(x.k, None, at), x.scale)"),
    Mutant("masked keys are read", "_core/inputs.py", "k, v = hide(k, key_mask), hide(v, key_mask)", "pass"),
    Mutant("masked keys weigh", "_core/inputs.py", "return log_mask(self.key_mask, self.q)", "return None"),
    Mutant("the scale of one side for both", "_core/inputs.py", "return math.sqrt(self.scale)", "return self.scale"),
    Mutant("half precision sums", "_core/inputs.py", "xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x", "x"),
    Mutant("a maximum that is minus infinity", "_core/average.py", "return namespace(top).where(top == -math.inf, 0.0, top)", "return top"),
    Mutant("a merge that forgets a weight", "_core/average.py", "(weight_b / safe)[..., None] * out_b", "out_b"),
    Mutant("a causal mask off by one", "_core/average.py", "n - m >= 0", "n - m > 0"),
    Mutant("blocks that forget the earlier keys", "_backends/inplace.py", "shrink = xp.exp(top - part.top)", "shrink = 0 * xp.exp(top - part.top)"),
    Mutant("tiles in the wrong order", "_backends/inplace_ops.py", "return xp.moveaxis(xp.reshape(x, (*x.shape[:-1], tiles, n)), -2, -3) if tiles else x", "return xp.reshape(x, (*x.shape[:-2], tiles, x.shape[-2], n)) if tiles else x"),
    Mutant("exponentials that no float holds", "_backends/inplace.py", "xp.min(total) > _SAFE_SUMS[0]", "xp.min(total) > 0"),
    Mutant("factors that no float holds", "_backends/inplace.py", "xp.abs(common) < _SAFE_BIAS", "xp.abs(common) < math.inf"),
    Mutant("a bias that weighs values alone", "_backends/inplace.py", "xp.matmul(factor[..., None, :], x)[..., 0, :]", "xp.sum(x, axis=-2)"),
    Mutant("keys that a tile leaves out", "_backends/inplace.py", "x[xp.nonzero(xp.broadcast_to(absent, x.shape[:-1]))] = 0", "pass"),
    Mutant("a bias of more heads taken for that of tiles", "_backends/inplace.py", "1 < bias.shape[-2] == q.shape[-3]", "1 < bias.shape[-2]"),
    Mutant("sums that overflow once they meet values", "_backends/inplace.py", "(1e-12, 1e18)", "(1e-12, 1e30)"),
    Mutant("a logarithm of fewer heads than its average", "_core/average.py", "    if tuple(log_norm.shape) == shape:\n", "    if True:\n"),
    Mutant("weights of pairs left out", "_backends/inplace.py", "return ops.multiply(weights, self.keys.pair_weight.of(q, ops))", "return weights"),
    Mutant("a block's own tokens not in the state", "_estimators/causal_scan.py", "after = merge(before, average(log_xi, v))", "after = before"),
    Mutant("a level that sees the block's last key", "_estimators/rfa.py", "else log_xi[..., 0])", "else log_xi[..., -1])"),
    Mutant("a level that sees all the block's keys", "_estimators/rfa.py", "else log_xi[..., 0])", "else xp.max(log_xi, axis=-1))"),
    Mutant("a level of no key at all", "_estimators/rfa.py", "_of_first(log_xi, before) if is_masked", "0 * before.log_norm if is_masked"),
    Mutant("padded queries are read", "_core/inputs.py", "replace(x, q=hide(q, query_mask), query_mask", "replace(x, query_mask"),
    Mutant("padded queries have results", "_core/inputs.py", "        out = hide(out, self.query_mask)\n", ""),
    Mutant("keys of a part say which queries are padding", "_estimators/primitives.py", "is_self=False", "is_self=True"),
    Mutant("a padded query that weighs in merge", "_estimators/primitives.py", "log_norm = xp.where(x.query_mask, log_norm, -math.inf)", "pass"),
    Mutant("warnings before the error", "_backends/numpy.py", 'errstate(over="raise")', 'errstate(over="warn")'),
    Mutant("a padded key in a block", "_estimators/causal_scan.py", "log_xi + x.xp.matrix_transpose(others[0]), others[1:]", "log_xi, others[1:]"),
    Mutant("proposals that are not over", "_tokens/grids.py", "return ends[None, :] < starts[:, None]", "return ends[None, :] <= starts[:, None] + 1"),
    Mutant("a mixture with the proposal to come", "_estimators/lara_causal.py", "return xp.logaddexp(before, one), before", "return xp.logaddexp(before, one), xp.logaddexp(before, one)"),
    Mutant("a mixture without its number of standard draws", "_estimators/lara_causal.py", "math.log(others)", "0.0"),
    Mutant("what is before the window on another scale", "_estimators/lara_causal.py", "log_norm - x.scale / 2 * dot(q, q)", "log_norm"),
    Mutant("key landmarks mixed with those to come", "_estimators/lara.py", "log_mask(there, kt), is_causal=is_causal))", "log_mask(there, kt)))"),
    Mutant("a standard draw centred", "_estimators/lara_weights.py", "[xp.zeros_like(t[..., :1, :])]", "[xp.zeros_like(t[..., :1, :]) - mean]"),
    Mutant("a group of a window that is not full", "_estimators/eva_step.py", "full = n - n % window", "full = n"),
    Mutant("a step's group a token early", "_estimators/eva_step.py", "place == window - 1", "place == window - 2"),
    Mutant("a window that is not emptied", "_estimators/eva_step.py", "slots < place, state.bias.ndim", "slots < window, state.bias.ndim"),
    Mutant("a rest that has the window's own keys", "_tokens/pooling.py", "    parts = later(parts, 1)\n", ""),
    Mutant("groups keep what is exact", "_estimators/adaptive_eva_keys.py", "groups + 1)[:, :, :groups, :]", "groups + 1)[:, :, :groups, :] * 0"),
    Mutant("a key of another head", "_estimators/adaptive_eva_keys.py", "number = xp.astype(heads.of_keys, slots.dtype)", "number = 0 * xp.astype(heads.of_keys, slots.dtype)"),
    Mutant("a group's values with those of the next", "_backends/numpy.py", "sums[xp.maximum(ends - 1, 0)", "sums[xp.maximum(ends - 2, 0)"),
    Mutant("the keys that matter least", "_estimators/adaptive_eva_keys.py", "own.largest(own.constant(score)", "own.largest(-own.constant(score)"),
    Mutant("the loudest chooser alone", "_estimators/adaptive_eva_keys.py", "logits - finite(xp.max(logits, axis=-1, keepdims=True))", "logits"),
    Mutant("values all alike", "_estimators/adaptive_eva_keys.py", "score = xp.max(share, axis=-2) + weight", "score = xp.max(share, axis=-2) + xp.where(weight == -math.inf, weight, 0.0)"),
    Mutant("padding as the largest logit", "_estimators/adaptive_eva_keys.py", "logits = xp.where((weight == -math.inf)[..., None, :], -math.inf, logits)", "pass"),
    Mutant("errors in the units of the values", "_estimators/adaptive_eva_blocks.py", "errors = errors / xp.where(whole == 0, 1.0, whole)", "pass"),
    Mutant("the first queries without the remainder", "_estimators/adaptive_eva_options.py", "return first + (n - first) % block, block", "return first, block"),
    Mutant("the queries see each other", "_core/average.py", "self.of(slice(before, None))._replace(is_causal=True)", "self.of(slice(before, None))"),
    Mutant("a padded key counted", "_estimators/adaptive_eva_keys.py", "ones = xp.astype(mask, k.dtype)[..., None]", "ones = xp.astype(mask | True, k.dtype)[..., None]"),
    Mutant("a block chosen for by itself", "_estimators/adaptive_eva_blocks.py", "x.q[:, :, start - width : start, :]", "x.q[:, :, start : start + width, :]"),
    Mutant("the heads that err least", "_estimators/adaptive_eva_blocks.py", "own.order_of(-errors,", "own.order_of(errors,"),
    Mutant("a block that sees its own later keys", "_estimators/adaptive_eva_keys.py", "rest[0][..., 0] if rest else None, is_causal=True)", "rest[0][..., 0] if rest else None)"),
    Mutant("padding among a block's own keys", "_estimators/adaptive_eva_keys.py", "rest[0][..., 0] if rest else None, is_causal=True)", "None, is_causal=True)"),
    Mutant("a mask of any axes", "_core/checks.py", "and len(shape) - 1 in (0, len(axes), len(lead))", "and True"),
    Mutant("a mask that widens the result", "_core/checks.py", "size == 1 or size in sizes for size, sizes", "True for size, sizes"),
    Mutant("a mask of tokens-first arrays as it is", "_core/inputs.py", "return swapped(mask, axes - 2)", "return mask"),
    Mutant("a result in the other layout", "_core/inputs.py", "return swapped(x, x.ndim - trailing - 1) if self.tokens_first else x", "return x"),
    Mutant("options without effect", "_core/checks.py", "if is_given and not is_met:", "if False:"),
    Mutant("heads ranked once", "_estimators/adaptive_eva_blocks.py", "if m - n + later >= max(m / 2, 2 * (m - n + start)):", "if False:"),
    Mutant("heads ranked again by the first queries", "_estimators/adaptive_eva_blocks.py", "starts = [queries.start - size for queries in segments]", "starts = [options.first - size for _ in segments]"),
    Mutant("heads in the order of their errors", "_estimators/adaptive_eva_blocks.py", "place = backend_of(x.q).order_of(order)", "place = order"),
    Mutant("the mean of values to come", "_estimators/adaptive_eva_blocks.py", "known = m - n + options.first if options.is_causal else m", "known = m"),
    Mutant("new groups in the first places", "_estimators/adaptive_eva_state.py", "first = state.indexed // GROUP", "first = 0 * state.indexed"),
    Mutant("recent tokens that stay when they go into groups", "_estimators/adaptive_eva_state.py", "state.recent[:, size:, :], state.recent_bias[:, size:]", "state.recent[:, :size, :], state.recent_bias[:, :size]"),
    Mutant("features by padding", "_estimators/adaptive_eva_state.py", "k = weight * (k - ", "k = (k - "),
    Mutant("features that are large, not varied", "_estimators/adaptive_eva_state.py", "xp.where(total > 0, total, 1.0))", "xp.where(total > 0, total, 1.0) * 0)"),
    Mutant("a mean over padding", "_estimators/adaptive_eva_state.py", "xp.where(sizes > 0, sizes, 1.0)[..., None]", "GROUP"),
    Mutant("chosen groups that weigh twice", "_estimators/adaptive_eva_step.py", "is_left = ~own.marked(chosen, count)", "is_left = (own.marked(chosen, count) | True)"),
    Mutant("the groups that matter least", "_estimators/adaptive_eva_step.py", "own.largest(score, groups)", "own.largest(-score, groups)"),
    Mutant("the loudest of the heads that share keys", "_estimators/adaptive_eva_step.py", "logits - finite(xp.max(logits, axis=-1, keepdims=True))", "logits"),
    Mutant("the token to come in a piece", "_estimators/adaptive_eva_step.py", "slots[None, :] <= xp", "slots[None, :] <= 1 + xp"),
    Mutant("a group that weighs one", "_estimators/adaptive_eva_step.py", "xp.log(xp.where(sizes > 0, sizes, 1.0))", "0 * xp.log(xp.where(sizes > 0, sizes, 1.0))"),
    Mutant("tokens without places", "_estimators/adaptive_eva_step.py", "xp.where(with_rank(fits[:, None], 4), out, math.nan)", "out"),
    Mutant("optimal features without their weights", "_estimators/rfa.py", "log_z = log_z + log_weight", "log_z = log_z + 0 * log_weight"),
    Mutant("a spread without what queries and keys share", "_estimators/rfa_features.py", "+ 2 * dot(mean_q, mean_k)[..., None])", "+ 0 * dot(mean_q, mean_k)[..., None])"),
    Mutant("features scaled on one side", "_estimators/rfa_features.py", "k=x.k / nonzero(factor)", "k=x.k"),
    Mutant("a simplex that is orthogonal", "_core/draws.py", "(rows - xp.mean(rows, axis=-2, keepdims=True)) * (features", "(rows - 0 * xp.mean(rows, axis=-2, keepdims=True)) * (features"),
    Mutant("orthogonal rows of one length", "_core/draws.py", "rows * lengths[..., None]", "rows"),
    Mutant("signs of QR left open", "_core/draws.py", "signs = xp.where(diagonal < 0, -xp", "signs = xp.where(diagonal < 0, xp"),
    Mutant("uniforms from the normal draws' stream", "_core/draws.py", 'bits.jumped() if kind == "uniform" else bits', "bits"),
    Mutant("all heads share their draws", "_core/draws.py", 'cast("Kind", kind), (*broadcast_shapes(x.lead, lead), *shape))', 'cast("Kind", kind), shape)'),
    Mutant("a window's bias turned round", "_estimators/options.py", "return own[..., None, :, :]", "return x.xp.matrix_transpose(own)[..., None, :, :]"),
    Mutant("a window's bias that sees what is to come", "_estimators/options.py", "own = x.xp.where(x.xp.matrix_transpose(past(own, size, 0, 0)), own, -math.inf)", "pass"),
    Mutant("effective samples without the square", "_estimators/final_average.py", "(x / total[..., None]) ** 2", "(x / total[..., None])"),
    Mutant("a pair's weight is not looked at", "_estimators/final_average.py", "x * xp.matrix_transpose(keys.pair_weight.of(q))", "x"),
    Mutant("replicates share their draws", "_study/diagnose.py", 'for source in spawned(options["rng"], num_replicates, x)', 'for source in spawned(options["rng"], 1, x) * num_replicates'),
    Mutant("entropy without the scale", "_study/diagnose.py", "log_norm - x.scale * dot(q, mean_key)", "log_norm - dot(q, mean_key)"),
    Mutant("padded queries are summed", "_study/diagnose.py", "squares = xp.where(with_rank(self._mask, squares.ndim), squares, 0.0)", "pass"),
    Mutant("rows that are none", "_study/diagnose.py", "<= 1e-3 * largest", "<= math.inf"),
]  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Tell whether the suite passes on the broken sources."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "randattn"
        shutil.copytree(ROOT / "src" / "randattn", sources)
        path = sources / mutant.file
        text = path.read_text()
        if text.count(mutant.line) != 1:
            raise SystemExit(f"{mutant.what}: not one such line in {mutant.file}: {mutant.line!r}")
        path.write_text(text.replace(mutant.line, mutant.broken))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *SHARED]
        run = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
            check=False,
        )
        # 1: tests failed. Anything else is no verdict.
        if run.returncode not in (0, 1):
            raise SystemExit(f"{mutant.what}: pytest did not run\n{run.stdout}{run.stderr}")
        return run.returncode == 0


def main() -> int:
    """Try every mutant, print what became of it."""
    if not survives(Mutant("nothing broken", "_core/average.py", "import math", "import math")):
        raise SystemExit("the suite fails on the sources as they are")
    survivors = 0
    # Threads that wait for processes: one for each core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, alive in zip(MUTANTS, pool.map(survives, MUTANTS), strict=True):
            survivors += alive
            print(f"{'SURVIVES' if alive else 'caught  '}  {mutant.file:36} {mutant.what}", flush=True)
    print(f"{len(MUTANTS) - survivors} passed, {survivors} failed")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
