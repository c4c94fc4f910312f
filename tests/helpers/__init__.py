"""What tests of several rooms share. Those of one room lie beside its tests; fixtures for all are in conftest."""
