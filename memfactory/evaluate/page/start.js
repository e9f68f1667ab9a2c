
showCurves();
showRewards();
startPareto();
if (entries.length) startBrowser();
