"""`launch.left`, but what does not go at once is not waited for.

python -m tests.impatient --down
"""

from core.console import run_entry
from launch import left

if __name__ == "__main__":
    left.WAIT_SECONDS = 0.0
    run_entry(left.main)
