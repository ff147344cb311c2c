"""The leader's start: it asks its peers what they hold before it leads, so that a lost volume never empties theirs.

The invariant it owns (promise 4): a leader never leads with less than a peer of its history holds, as long as that peer
can be asked, and never begins a history while one may exist elsewhere.

    table.py    what follows from what: `decide`, a pure function
    leader.py   `Leader`: asks, carries out what was decided, leads, and looks again when a peer shows up
    known.py    `KnownPeers`: whom to ask, and what they say
    rounds.py   `Rounds`: one round of questions for all readers who want to know that this node still leads
"""

from mehdb.recovery.leader import SILENT_TIMEOUT_S, Leader
from mehdb.recovery.table import CatchUp, Decision, Lead, Own, Peers, Refuse, TakeSnapshot, Wait, contradiction, decide

__all__ = [
    "SILENT_TIMEOUT_S",
    "CatchUp",
    "Decision",
    "Lead",
    "Leader",
    "Own",
    "Peers",
    "Refuse",
    "TakeSnapshot",
    "Wait",
    "contradiction",
    "decide",
]
