"""Sizes of the blocks in which averages are computed, for each way to compute them.

Every size is read where it is used as ``block_sizes.NAME``, so that tests can make it small. The unit is the
logit (a pair of a query and a key, over all leading axes) unless a comment names another unit. The sizes for
CPUs were chosen by time on two cores, float32, 8 heads of 64 features: twice or half of a size is slower, or
no faster and larger in memory.
"""

from __future__ import annotations

# Logits of a block of the plain average: 16 MiB in float32 for the new array of each operation.
PLAIN_LOGITS = 1 << 22
# The fewest keys and queries of a block that is cut: thinner products are far from a core's peak speed.
PLAIN_MIN_KEYS, PLAIN_MIN_QUERIES = 1024, 32

# Logits of a block in place on a CPU: 4 MiB in float32, so that a block stays in the cache from its product
# to its sum. With 1 MiB the products were smaller and NumPy slower.
INPLACE_LOGITS = 1 << 20
# The fewest keys and queries of a block that is cut in place: thin products lose more than the cache gains.
INPLACE_MIN_KEYS, INPLACE_MIN_QUERIES = 1024, 64
# The fewest queries of a block of all heads, on a library whose batched product is faster than a product for
# each head. With fewer queries a block takes a part of the heads.
INPLACE_FEW_QUERIES = 512

# Logits of a block on a GPU: 128 MiB in float32. It trades memory for processors that are kept busy.
GPU_LOGITS = 1 << 25

# Logits of a call that is computed without blocks: below it, cutting blocks takes longer than the work in
# them. `mean_by_product` compares numbers of entries with it, for the same reason.
SMALL_LOGITS = 1 << 16

# Loops of a compiled program on a CPU: logits of a block (1 MiB in float32, as fast as smaller blocks), and
# the most logits of a block before its keys are cut too (16 MiB).
COMPILED_LOGITS, COMPILED_MOST_LOGITS = 1 << 18, 1 << 22
# The fewest queries of a block of a compiled program.
COMPILED_MIN_QUERIES = 64

# Tokens of a block of the causal pass of RFA: with as many tokens as features, the products within a block
# are as large as the products with the state.
CAUSAL_TOKENS = 64

# Queries up to which PyTorch's kernel, a set of keys at a time, is faster than products for all sets at once:
# with 3 queries and 4,096 keys by a factor of two, with 64 queries by a few percent.
SHORT_ROWS = 16

# Scores in a block of adaptive EVA without causality: 8 MiB in float32, for the cache.
CHOICE_NUMBERS = 1 << 21

# Keys up to which a call of adaptive EVA without options is exact attention. PyTorch's own kernel is faster
# up to about this length; docs/adaptive.md has the times of each library at 2,048 and 4,096 keys.
ADAPTIVE_KEYS = 4096
