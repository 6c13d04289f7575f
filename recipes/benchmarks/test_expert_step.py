"""The step of a mixture of experts against dense TopK SAEs: of the same width, and of the same encoder FLOPs."""

from __future__ import annotations

import pytest
import sae_steps as steps
from conftest import DEVICE, QUICK, Compare
from sae_steps import Size

SIZE = Size(16, 256, 4, 32, layers=1) if QUICK else Size(576, 9216, 32, 2048, layers=1)
EXPERTS = 16
ACTIVE = (1, 2, 4, 8, 16)


@pytest.mark.parametrize("scaling", ["mean", "none"])
@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("against", ["width", "FLOPs"])
def test_step(compare: Compare, against: str, active: int, scaling: str):
    if scaling == "none" and active != 2:
        pytest.skip("scaling costs the same for every number of active experts")
    if against == "FLOPs" and active == EXPERTS:
        pytest.skip("the same as of equal width")
    computed = SIZE.width * active // EXPERTS
    dense = SIZE if against == "width" else SIZE._replace(width=computed)
    name = f"{active} of {EXPERTS} experts" + (", no feature scaling" if scaling == "none" else "")
    compare(
        steps.experts(SIZE, DEVICE, n_experts=EXPERTS, active=active, scaling=scaling).run,
        steps.route(dense, DEVICE).run,
        group="Step of a mixture of experts",
        name=name,
        unit=f"RouteSAE's step of equal {against} (one layer, width {dense.width:,})",
        size=str(SIZE),
    )
