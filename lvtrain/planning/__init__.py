"""What a run will need before it runs: memory a rank, time a step, bytes on the wire. `plan(...)` is the front door."""

from lvtrain.planning.device import H200, Device
from lvtrain.planning.memory import ClassRows
from lvtrain.planning.network import Network, measure_network
from lvtrain.planning.phases import plan_phases
from lvtrain.planning.plan import Plan, plan
from lvtrain.planning.wire import Transfer

__all__ = ["H200", "ClassRows", "Device", "Network", "Plan", "Transfer", "measure_network", "plan", "plan_phases"]
