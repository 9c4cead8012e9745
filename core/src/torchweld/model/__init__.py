"""A model and its parts: names, groups, surgery, and the facts found in them."""
