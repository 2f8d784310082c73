"""How long a test waits for an event. The wait ends with the event: the limit is only there for what never comes."""

# A busy machine may take many times as long as an idle one.
PATIENCE_SECONDS = 1200.0
