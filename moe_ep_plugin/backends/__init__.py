"""How bytes move. One contract (:mod:`.base`), one module per way of moving them."""
