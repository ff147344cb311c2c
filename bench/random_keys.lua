-- wrk's requests, for random keys out of those that dataset.py wrote; and wrk's result, as one line of JSON.
-- Arguments: a load as load.py names them, the number of keys, a seed.
-- Keys, values and MANY are those of dataset.py: change both.

local VALUE_BYTES = 128
local MANY = 100
local PAUSE_MS_MAX = 8 -- between an answer and the next request of a calm load: 0 to this, so that none beats time
local make, keys

local function random_key()
  return string.format("key/%08d", math.random(0, keys - 1))
end

local function value_of(key)
  return key .. string.rep("v", VALUE_BYTES - #key)
end

-- Return MANY keys, none of them twice, each as `form` makes it.
local function distinct(form)
  local taken, forms = {}, {}
  while #forms < MANY do
    local key = random_key()
    if not taken[key] then
      taken[key] = true
      forms[#forms + 1] = form(key)
    end
  end
  return forms
end

local function with_body(line, body)
  return line .. " HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: " .. #body .. "\r\n\r\n" .. body
end

local function get()
  return "GET /get/" .. random_key() .. " HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
end

local LOADS = {
  GET = get,
  ["calm GET"] = get,
  PUT = function()
    local key = random_key()
    return with_body("PUT /set/" .. key, value_of(key))
  end,
  batch = function()
    return with_body("POST /batch", table.concat(distinct(function(key)
      return '{"op":"set","key":"' .. key .. '","value":"' .. value_of(key) .. '"}\n'
    end)))
  end,
  several = function()
    return with_body("POST /get", "[" .. table.concat(distinct(function(key) return '"' .. key .. '"' end), ",") .. "]")
  end,
}

function init(arguments)
  make, keys = LOADS[arguments[1]], tonumber(arguments[2])
  math.randomseed(tonumber(arguments[3]))
  if arguments[1] == "calm GET" then
    -- wrk waits so long before each request, and begins to measure it only then.
    delay = function() return math.random(0, PAUSE_MS_MAX) end
  end
end

function request()
  return make()
end

-- wrk counts a status of 400 or more in errors.status ("Non-2xx or 3xx responses").
function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '\nRESULT {"answers": %d, "duration_us": %d, "bytes": %d, "bad_statuses": %d, "broken": %d, ' ..
    '"p50_us": %d, "p99_us": %d}\n',
    summary.requests, summary.duration, summary.bytes, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
