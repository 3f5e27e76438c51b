"""Every bound of the engine, once, with its reason (law 9)."""

# A delta document; tensors travel beside it, as files
DOCUMENT_BYTES_MAX = 16 << 20
# Nesting of YAML and JSON; below CPython's recursion limit with a wide margin
DOCUMENT_DEPTH_MAX = 64
# Primitive edits of one delta after expansion: a whole 50,000-node graph replaced
EDITS_MAX = 100_000
# Elements of a tensor written inside a document; larger ones belong in safetensors
INLINE_ELEMENTS_MAX = 4_096
# Bytes one node may produce at its probe sizes; guards against `full([10**12])`
OUTPUT_BYTES_MAX = 4 << 30
# Header bloat stops other readers; ours needs about 100 bytes a tensor
SAFETENSORS_HEADER_BYTES_MAX = 1 << 20
# As above; GPT-2 XL has 580
SAFETENSORS_TENSORS_MAX = 10_000
# Node, constant, input and model names: module paths stay well below
NAME_CHARS_MAX = 256
# Revisions whose graph values stay in memory for rollback and diff; older ones are replayed
REVISIONS_KEPT_MAX = 64
# Delta ids remembered for idempotent retry, per model
DELTA_IDS_KEPT_MAX = 10_000
# Current and last good; more exist only while requests run on them
PLANS_RETIRED_MAX = 2
