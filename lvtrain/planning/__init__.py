"""What a run will need, before it runs: memory a rank, time a step, bytes sent. `plan_phases` plans a recipe."""

from lvtrain.planning.device import H200, Device, device
from lvtrain.planning.micro_batches import planned_micro_batches
from lvtrain.planning.network import Network, measure_network
from lvtrain.planning.phases import plan_phases
from lvtrain.planning.plan import Plan, plan
from lvtrain.planning.run import RunPlan
from lvtrain.planning.scale import scale_table
from lvtrain.planning.setup import ClassCentres, FrozenNetwork, Setup, Zero
from lvtrain.planning.suggest import ROOM, Suggestion, suggest
from lvtrain.planning.wire import Transfer

__all__ = [
    "H200",
    "ROOM",
    "ClassCentres",
    "Device",
    "FrozenNetwork",
    "Network",
    "Plan",
    "RunPlan",
    "Setup",
    "Suggestion",
    "Transfer",
    "Zero",
    "device",
    "measure_network",
    "plan",
    "plan_phases",
    "planned_micro_batches",
    "scale_table",
    "suggest",
]
