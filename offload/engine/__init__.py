"""What streams one model. `build` puts the parts together, `engine` holds them and ends
them, `tiers` and `readers` choose where weights come from; `site_hooks` ties all of it
to the model's modules."""
