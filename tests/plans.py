"""Three machines, a law and prices with round figures, and the plans for a sum on them."""

from datetime import date

from clouds.base import Offer
from core.loss.law import Law, Recipe
from costs import discover
from costs.forecast import Assumptions
from costs.plan import planner
from costs.plan.machines import Machine
from costs.plan.planner import Prices, Question


def offer(**fields) -> Offer:
    return Offer(**{
        "cloud": "aws", "region": "us-west-2", "zone": None, "vcpus": 96.0, "memory_gb": 1152.0, "arch": "x86_64",
        "usd_on_demand": 20.0, "usd_spot": 8.0,
    } | fields)  # fmt: skip


TODAY = date(2026, 11, 30)
RATES = discover.RATES["aws"]  # $0.023 per GB and month, $0.09 per GB of egress
ASSUME = Assumptions(
    provision_seconds=150, image_seconds=180, setup_seconds=30, ready_seconds=90, checkpoint_blocked_seconds=0.3,
    preemptions_per_hour=0.25, controller_usd_per_hour=0.2,
)  # fmt: skip
LAW = Law(
    date="2026-11-30",
    constants={"E": 2.06, "A": 0.409, "a": 0.255, "B": 0.606, "b": 0.296},
    gain=1.52,
    recipes={
        "track3-muon": Recipe(k=1.55, runs=2, smallest=84_934_656, largest=84_934_656, family="muon"),
        "gpt2-adamw": Recipe(k=0.27, runs=1, smallest=84_934_656, largest=84_934_656, family="adamw"),
        "muon-modern": Recipe(k=1.0, runs=2, smallest=84_934_656, largest=1_472_200_704, family="muon"),
        "adam-modern": Recipe(k=0.66, runs=2, smallest=84_934_656, largest=1_472_200_704, family="adamw"),
    },
)
GH200 = offer(cloud="lambda", zone=None, instance_type="gpu_1x_gh200", accelerator="GH200", accelerators=1)
A100S = offer(cloud="lambda", zone=None, instance_type="gpu_8x_a100", accelerator="A100", accelerators=8)
H100S = offer(cloud="aws", zone="usw2-az1", instance_type="p5.48xlarge", accelerator="H100", accelerators=8)


def machine(of: Offer, usd: float, spot: bool = False, idle: float = 120.0) -> Machine:
    return Machine("sky/x.yaml", (), of, spot, usd, usd, usd, TODAY, 0.0 if spot else idle)


MACHINES = {
    "GH200": machine(GH200, 2.29),
    "A100": machine(A100S, 15.92),
    "H100 spot": machine(H100S, 12.97, spot=True),
}


def answer(usd: float, *which: str, **fields) -> planner.Answer:
    buyers, refused = planner.buyers([MACHINES[name] for name in which], Prices(ASSUME, RATES))
    return planner.plan(Question(usd, **fields), buyers, refused, LAW)
