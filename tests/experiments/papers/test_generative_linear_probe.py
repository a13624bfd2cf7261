from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("generative_linear_probe", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("generative_linear_probe", tmp_path)


def test_paper_step():
  recipe_checks.check_paper_step("generative_linear_probe")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("generative_linear_probe", tmp_path)
