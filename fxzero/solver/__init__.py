"""What to save and what to recompute, where and how often, under a peak of bytes.

    problem     the training step in numbers: storages, operators, bytes that no decision changes
    schedule    what runs again where, and its exact bytes at every instant: the judge of all below
    program     the integer program of single recompute, for any size (with frames, linear)
    exact       the program over time, for small problems: proven optima
    eviction    makes a schedule fit; values may then be recomputed more than once
    dropping    takes out what need not run again
    bound       what no schedule can undercut
    cuts        small peaks
    search      which of these to ask, and what has been proven

Nothing here knows of graphs, but for ``problem``; ``graph_planner.py`` turns schedules into
decisions.
"""
