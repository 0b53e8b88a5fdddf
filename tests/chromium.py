"A browser for tests of pages."
import shutil
from contextlib import contextmanager

import pytest

ALWAYS = (
    '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-background-networking',
    '--disable-dev-shm-usage')


@contextmanager
def chromium(*arguments):
    "Chromium without a window, with its logs. The test is skipped if Chromium is not installed."
    program = shutil.which('chromium') or shutil.which('google-chrome')
    driver = shutil.which('chromedriver')
    if not (program and driver):
        pytest.skip('needs Chromium and its driver: apt-get install chromium chromium-driver')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (*ALWAYS, *arguments):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
