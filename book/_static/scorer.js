/* Search results: chapters come before the pages of the API. */
var Scorer = {
  score: function (result) {
    var page = result[0], score = result[4];
    return page.indexOf("book/api") === 0 ? score - 100 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
