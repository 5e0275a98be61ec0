"""What is minimized. An objective is a function (variables, batch, rng) -> Loss; it knows neither data nor loop."""
