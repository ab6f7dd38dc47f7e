"""How much of an average is held at a time, on each way to compute it.

Every size is read where it is used as ``block_sizes.NAME``, so that tests can make it small. Sizes count
logits (pairs of a query and a key, over all leading axes), unless they say otherwise. They were chosen by
time on two CPU cores, float32, 8 heads of 64 features: twice and half of each is slower, or no faster and
larger.
"""

from __future__ import annotations

# The plain way (`_core.average`): 16 MiB of logits in float32. It bounds memory, since each step makes a new
# array.
PLAIN_LOGITS = 1 << 22
# Keys and queries below which no block is cut: products that are thinner are far from the peak of a core.
PLAIN_MIN_KEYS, PLAIN_MIN_QUERIES = 1024, 32

# In place on a CPU: 4 MiB, so that a block stays in the cache from its product to its sum.
INPLACE_LOGITS = 1 << 20
INPLACE_MIN_KEYS, INPLACE_MIN_QUERIES = 1024, 64
# Queries of a block for all heads together, where a library computes such a product faster than one for each
# head.
INPLACE_FEW_QUERIES = 512

# On a GPU: 128 MiB, enough to keep all of its processors busy.
GPU_LOGITS = 1 << 25

# A call of so few logits is computed whole: laying out its blocks would take longer than the work in them.
SMALL_LOGITS = 1 << 16

# Loops of a compiled program: blocks that a CPU computes as fast as smaller ones; the most before keys are
# cut too; queries below which no block is cut.
COMPILED_LOGITS, COMPILED_MOST_LOGITS = 1 << 18, 1 << 22
COMPILED_MIN_QUERIES = 64

# Tokens of a block of the causal pass of RFA: with as many as there are features, the block's own products
# are as large as the products with the state.
CAUSAL_TOKENS = 64

# Numbers (scores; gathered keys and values) that a choice of keys holds: 8 MiB in float32, within the cache.
CHOICE_NUMBERS = 1 << 21
