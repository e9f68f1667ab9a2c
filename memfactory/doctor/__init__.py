"""What a machine lacks for memfactory, or for one recipe on it: found, supported, what to do.

A check is a function that gives a :class:`~memfactory.doctor.check.Check`; it looks and changes nothing.
"""
