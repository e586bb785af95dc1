"""Tables in which every id has a row of its own: admission, eviction, the way of ids to rows."""
