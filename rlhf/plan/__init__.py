"""Everything a recipe implies, derived and checked before anything starts: actors, engines, batches, memory.

Pure arithmetic on configurations: it imports no torch, starts nothing, and takes well under a second.

    derive.py      make_plan: the order of it
    feasibility.py why not, whatever the machine: names, links, lengths
    refusals.py    why not, on this machine or with this model
    engines.py     which engines start, and who uses them
    placement.py   the memory of each process
    nodes.py       which process stands on which node and GPU, as Ray would place it
    advice.py      with what a recipe that does not fit would
    verdicts.py    what `rlhf check` measured
    text.py        a plan in print
"""

from rlhf.plan.cluster import Cluster, Node
from rlhf.plan.derive import check, make_plan
from rlhf.plan.nodes import gathered, reserved
from rlhf.plan.text import describe
from rlhf.plan.types import Memory, Plan, PlanError
from rlhf.plan.verdicts import VERDICTS, Verdict, implementations, installed_versions, read_verdicts

__all__ = [
    "VERDICTS",
    "Cluster",
    "Memory",
    "Node",
    "Plan",
    "PlanError",
    "Verdict",
    "check",
    "describe",
    "gathered",
    "implementations",
    "installed_versions",
    "make_plan",
    "read_verdicts",
    "reserved",
]
