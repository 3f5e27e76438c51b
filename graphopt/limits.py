"""Every bound of the engine, once, with its reason (law 9)."""

DOCUMENT_BYTES_MAX = 16 << 20  # a delta document; tensors travel beside it, as files
DOCUMENT_DEPTH_MAX = (
    64  # nesting of YAML and JSON; below CPython's recursion limit with a wide margin
)
EDITS_MAX = (
    100_000  # primitive edits of one delta after expansion: a whole 50,000-node graph replaced
)
INLINE_ELEMENTS_MAX = (
    4_096  # elements of a tensor written inside a document; larger ones belong in safetensors
)
OUTPUT_BYTES_MAX = (
    4 << 30
)  # bytes one node may produce at its probe sizes; guards against `full([10**12])`
SAFETENSORS_HEADER_BYTES_MAX = (
    1 << 20
)  # header bloat stops other readers; ours needs about 100 bytes a tensor
SAFETENSORS_TENSORS_MAX = 10_000  # as above; GPT-2 XL has 580
NAME_CHARS_MAX = 256  # node, constant, input and model names: module paths stay well below
REVISIONS_KEPT_MAX = (
    64  # revisions whose graph values stay in memory for rollback and diff; older ones are replayed
)
DELTA_IDS_KEPT_MAX = 10_000  # delta ids remembered for idempotent retry, per model
PLANS_RETIRED_MAX = 2  # current and last good; more exist only while requests run on them
