"""One module per framework, which imports it; the library imports none of them."""
