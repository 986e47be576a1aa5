"""Records as tables, plots and verdicts: records in, something to look at out.

Every label, order and colour is the registry's (:mod:`npmerge.methods`): there is no list of methods here, and one that
an experiment adds appears by itself.
"""
