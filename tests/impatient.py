"""`launch.down`, but what does not go at once is not waited for.

python -m tests.impatient --down
"""

from core.console import run_entry
from launch import down

if __name__ == "__main__":
    down.WAIT_SECONDS = 0.0
    run_entry(down.main)
