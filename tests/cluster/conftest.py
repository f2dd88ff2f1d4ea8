"""Environment of the clusters here; each test starts its own and ends it."""

import os

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
