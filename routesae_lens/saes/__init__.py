"""SAEs over several layers, as SAELens architectures. Importing this package registers them."""
