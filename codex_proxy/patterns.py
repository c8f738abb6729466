"""Names with wildcards, as people write them for models: `*` stands for anything, nothing else is special."""


def fits(pattern: str, name: str) -> bool:
    """Tell whether *name* fits *pattern*; letters count the same in either case.

    Linear on purpose: callers choose the names, and a regular expression with many wildcards is not.
    """
    first, *rest = pattern.lower().split("*")
    name = name.lower()
    if not rest:
        return name == first
    if not name.startswith(first):
        return False
    place = len(first)
    *middle, last = rest
    for part in middle:
        found = name.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return len(name) - place >= len(last) and name.endswith(last)
