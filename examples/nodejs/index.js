"use strict";
const express = require("express");

const port = process.env.PORT || 3000;
const app = express();
app.get("/", (request, response) => response.send(`Hello from Flynn on port ${port}\n`));
app.listen(port, () => console.log(`Listening on ${port}`));
