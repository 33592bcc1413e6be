"""Runs a session's notebooks as notebook 00 does."""


def run_all(session):
    """Runs what is not done; returns a dict with the number of figures of each notebook that ran."""
    figures = {}
    for name, (state, _) in session.list_states().items():
        if state != "done" and not session.must_wait(name):
            figures[name] = sum(len(new) for _, _, new in session.run(name))
    return figures
