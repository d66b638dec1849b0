"""One kind of kernel each: its figures, its limits, how the report shows them."""
