-- wrk's requests: GET or PUT of random keys out of those that dataset.py wrote; and wrk's result, as one line of JSON.
-- Arguments: GET|PUT, the number of keys, a seed. Keys and values are those of dataset.py: change both.

local VALUE_BYTES = 128
local method, keys

function init(arguments)
  method, keys = arguments[1], tonumber(arguments[2])
  math.randomseed(tonumber(arguments[3]))
end

function request()
  local key = string.format("key/%08d", math.random(0, keys - 1))
  if method == "GET" then
    return "GET /get/" .. key .. " HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
  end
  local value = key .. string.rep("v", VALUE_BYTES - #key)
  return "PUT /set/" .. key .. " HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: " .. #value .. "\r\n\r\n" .. value
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
