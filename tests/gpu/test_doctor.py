"""What `finetune doctor --load` measures on a GPU."""

import json
from statistics import median

import pytest
import torch

from finetune.workstation import doctor, facts, load

pytestmark = pytest.mark.gpu


def test_what_is_known_without_torch_is_what_torch_says() -> None:
    known = facts.read()["torch"]
    assert known["gpus"] == torch.cuda.device_count()
    assert known["architectures"] == torch.cuda.get_arch_list()
    assert (known["version"], known["cuda"]) == (torch.__version__, torch.version.cuda)


def test_a_gpu_is_burnt_copied_to_and_sampled() -> None:
    found = facts.read()
    found["load"] = load.read(2.0, found)
    assert json.loads(json.dumps(found)) == found
    gpus = found["load"]["gpus"]
    assert len(gpus) == torch.cuda.device_count()
    for gpu in gpus:
        assert gpu["error"] is None
        assert gpu["wrong"] == 0
        assert gpu["copy_gb_per_s"] > 1
        assert gpu["tflops"] > 1
        assert gpu["index"] is not None
        clocks = [sample["clock_mhz"] for sample in gpu["samples"]]
        assert len(clocks) > 20  # ten a second, of the copies and the products
        assert median(clocks) > 300
    shown = {check.id: check for check in doctor.judge(found)}
    assert shown[f"load-products-{gpus[0]['index']}"].verdict.name == "ok"
    assert shown["bitsandbytes"].verdict.name == "ok"
    assert shown["attention"].verdict.name == "ok"
