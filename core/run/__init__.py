"""A run folder: what each machine writes into it, and the one reader of it.

    RUN_URL/run.json       what the run is                        folder.py
    RUN_URL/ledger/        time and marks of each segment         ledger.py, phases.py, segment.py
    RUN_URL/metrics/       numbers per step                       segment.py
    read_run(RUN_URL)      all of it, for every consumer          reader.py, model.py

A segment is one machine's stretch of a run.
"""
