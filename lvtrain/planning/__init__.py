"""What a run will need, before it runs: memory a rank, time a step, bytes sent. `plan_phases` plans a recipe."""

from lvtrain.planning.device import H200, Device, device
from lvtrain.planning.network import Network, measure_network
from lvtrain.planning.phases import default_micro_batches, plan_phases
from lvtrain.planning.plan import Plan, plan
from lvtrain.planning.run import RunPlan
from lvtrain.planning.setup import ClassCentres, FrozenNetwork, Setup, Zero
from lvtrain.planning.wire import Transfer

__all__ = [
    "H200",
    "ClassCentres",
    "Device",
    "FrozenNetwork",
    "Network",
    "Plan",
    "RunPlan",
    "Setup",
    "Transfer",
    "Zero",
    "default_micro_batches",
    "device",
    "measure_network",
    "plan",
    "plan_phases",
]
