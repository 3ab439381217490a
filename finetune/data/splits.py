"""Names of the parts of a data set that are not trained on, as people write them: `test.jsonl`, `"split": "val"`."""

import re

# As `datasets` takes file names for splits: test.jsonl, alpaca-val.json, validation-00000-of-00001.parquet.
HELD_OUT = re.compile(
    r"(?:^|[-_. ])(?:test|testing|eval|evaluation|val|valid|validation|dev)(?:[-_. ]?\d+(?:[-_. ]of[-_. ]\d+)?)?$", re.I
)
