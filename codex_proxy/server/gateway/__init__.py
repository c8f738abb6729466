"""The admin API of the gateway: users, keys, money, prices, upstreams, usage; for its page, and a key holder's own page."""
