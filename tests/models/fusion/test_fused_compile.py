"""Every memory mode under torch.compile, without a graph break, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.plain import assert_same, distance, pair
from support.formulations.plain_vapt import ACTING, seeded, vapt_pair

from vpt_fast import VAPT, VPTDeep, VPTShallow
from vpt_fast.ops.memory_modes import MEMORY_MODES

METHODS: dict[str, Any] = {
    "deep": VPTDeep(3, dropout=0.4),
    "late": VPTDeep(3, blocks=[1]),
    "shallow": VPTShallow(3, project_dim=6),
    "code": VAPT(3, **ACTING),
}
# Two blocks, the last of which computes all rows.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("vit_32px", {"global_pool": "avg"}),
    "layer_scale": ("vit_32px", {"global_pool": "avg", "init_values": 1.0}),
    "no_class_token": ("siglip_average", {}),
    "token": ("vit_32px", {}),
}
QUICK = {
    ("average", "code", "minimal"),
    ("layer_scale", "late", "lean"),
    ("no_class_token", "deep", "balanced"),
    ("token", "shallow", "speed"),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "method", "memory"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.full])
        for case in ((n, m, k) for n in FAMILIES for m in METHODS for k in MEMORY_MODES)
    ],
)
def test_compiled(name: str, method: str, memory: str) -> None:
    family, arguments = FAMILIES[name]
    base, image = families.build(family, **arguments), families.images(family, batch=3)
    pairs = vapt_pair if method == "code" else pair
    tuned, plain = pairs(base, METHODS[method], memory=memory)
    plain.training = True
    compiled = torch.compile(tuned.train(), fullgraph=True, backend="aot_eager")
    output = seeded(compiled, image)
    expected = seeded(plain if method in ("late", "shallow") else tuned, image)
    assert distance(output, expected) <= 1e-10
    torch.manual_seed(99)
    assert_same(tuned, plain, seeded(compiled, image), seeded(plain, image))
