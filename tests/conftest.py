"""For every test: what the session has left to the garbage collector stays out of its forks."""

import gc
import os

# A fork has none of the session's threads. Collecting there what the session left, such as a
# connection whose destructor waits for its thread, would never end.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)
