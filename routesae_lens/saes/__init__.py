"""SAEs over several layers, as SAELens architectures. Importing this package registers them."""

from routesae_lens.saes import architectures as architectures
from routesae_lens.saes import crosscoder as crosscoder
from routesae_lens.saes import experts as experts
from routesae_lens.saes import store as store
from routesae_lens.saes import transcoder as transcoder
