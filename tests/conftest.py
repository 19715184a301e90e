"""Settings of the whole suite."""

import torch
from hypothesis import settings

# Times vary on shared machines; nothing here tests speed.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Tests compute little, many times over: a second thread costs more than it brings.
torch.set_num_threads(1)
