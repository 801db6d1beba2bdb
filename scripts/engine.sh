#!/usr/bin/env bash
# A container engine for this machine, and the packet filter's command, which agents guard networks with.
#
#   engine.sh start     make sure that both are there; installs docker.io and nftables where they are missing
#   engine.sh stop      end the engine that was started from here; any other is left alone
#   engine.sh run CMD…  run a command with both; an engine that was started for it ends with the last such command
#   engine.sh status    say what there is
#
# An engine that answers is never touched: not restarted, not reconfigured, not stopped. Where systemd runs, the
# engine is its service. Elsewhere dockerd is started by itself, with a data directory of its own, so that whatever
# an earlier engine left in /var/lib/docker stays as it was.
#
# OUTRIDER_ENGINE_DIR   where that data, the pid file and the log lie (/var/lib/outrider-engine)
# DOCKER_HOST           the engine to look for, as for the docker command; one on another address is never started here
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/apt.sh"

dir=${OUTRIDER_ENGINE_DIR:-/var/lib/outrider-engine}
pidfile=$dir/dockerd.pid
log=$dir/dockerd.log
mark=$dir/started-by-us   # "systemd" or "dockerd", and the boot: what a reboot brought up again was not started by us
passing=$dir/stop-when-unused   # it was started by `run`, and nobody has asked for it to stay
boot=$(cat /proc/sys/kernel/random/boot_id)
wait_s=${OUTRIDER_ENGINE_WAIT:-60}

say() { printf 'engine: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
answers() { command -v docker >/dev/null && timeout 10 docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }
version() { docker version --format '{{.Server.Version}}' 2>/dev/null; }
has_systemd() { [ -d /run/systemd/system ]; }
need_root() { [ "$(id -u)" = 0 ] || die "$1 needs root: sudo scripts/engine.sh $2"; }

a_dockerd_runs() {
  local name
  for name in /proc/[0-9]*/comm; do
    # One that has ended and was not waited for yet has no command line any more.
    [ "$(cat "$name" 2>/dev/null)" = dockerd ] && grep -qs . "${name%comm}cmdline" && return 0
  done
  return 1
}

started_by_us() {
  local how when
  read -r how when 2>/dev/null <"$mark" || return 1
  [ "$when" = "$boot" ] && echo "$how"
}

# The dockerd of our pid file, if it still is one: numbers are used again.
our_dockerd() {
  local pid
  pid=$(cat "$pidfile" 2>/dev/null) || return 1
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ] && grep -qszF -- "$dir" "/proc/$pid/cmdline" && echo "$pid"
}

wait_until_it_answers() {
  local i
  for ((i = 0; i < wait_s * 4; i++)); do
    answers && return 0
    if [ "$1" = dockerd ] && ! our_dockerd >/dev/null; then return 1; fi
    if [ "$1" = other ] && ! a_dockerd_runs; then return 1; fi
    sleep 0.25
  done
  return 1
}

install_engine() {
  command -v apt-get >/dev/null || die "no container engine here, and no apt-get to install one: install Docker Engine 20.10 or later"
  # crun starts what steps need in less time than the engine's default; an agent takes it where the engine offers it.
  # An engine that is a service starts as soon as it is installed, so it has to be told beforehand.
  if has_systemd && [ ! -e /etc/docker/daemon.json ]; then
    mkdir -p /etc/docker
    echo '{"runtimes": {"crun": {"path": "/usr/bin/crun"}}}' >/etc/docker/daemon.json
  fi
  # Newer releases have the docker command in a package of its own, which docker.io merely recommends.
  apt_install docker.io iptables ca-certificates -- docker-cli crun ||
    die "docker.io could not be installed; the reason stands above"
}

# Agents guard the networks of their containers with nft, whichever engine there is.
install_packet_filter() {
  PATH=$PATH:/usr/sbin nft --version >/dev/null 2>&1 && return 0
  apt-get --version >/dev/null 2>&1 || { say "nft is missing: install nftables, or agents start nothing on a network"; return 0; }
  need_root "installing nftables" start
  apt_install nftables -- || die "nftables could not be installed; the reason stands above"
}

# Where the controllers are mounted one by one, crun refuses machines that have left some to version 2.
unite_control_groups() {
  local controller
  [ -r /sys/fs/cgroup/unified/cgroup.controllers ] || return 0
  for controller in $(cat /sys/fs/cgroup/unified/cgroup.controllers); do
    mkdir -p "/sys/fs/cgroup/$controller"
    mount -t cgroup -o "$controller" "$controller" "/sys/fs/cgroup/$controller" 2>/dev/null ||
      rmdir "/sys/fs/cgroup/$controller" 2>/dev/null || true
  done
}

start_dockerd() {
  if ! mountpoint -q /sys/fs/cgroup; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup || die "control groups are not mounted on /sys/fs/cgroup, and they could not be"
  fi
  rm -f "$pidfile"
  local runtimes=()
  if command -v crun >/dev/null && ! grep -qs '"runtimes"' /etc/docker/daemon.json; then
    runtimes=(--add-runtime "crun=$(command -v crun)")
    unite_control_groups
  fi
  # A session of its own: the engine and the containers outlive this terminal.
  setsid dockerd --data-root "$dir/data" --exec-root /run/outrider-engine --pidfile "$pidfile" "${runtimes[@]}" >"$log" 2>&1 </dev/null &
  local started=$! i
  for ((i = 0; i < 40; i++)); do
    [ -s "$pidfile" ] && break
    kill -0 "$started" 2>/dev/null || break
    sleep 0.25
  done
}

# Of an engine that only passes, `start` makes one that stays.
start() {
  bring_up
  rm -f "$passing" 2>/dev/null || need_root "keeping the engine" start
}

run() {
  mkdir -p "$dir" 2>/dev/null || need_root "running a command with an engine" "run …"
  exec 9>>"$dir/users"
  flock -s 9
  trap leave EXIT
  if ! answers; then
    touch "$passing"
    bring_up 9>&-
  else
    install_packet_filter
  fi
  # Nothing that the command leaves behind may count as one who uses the engine.
  "$@" 9>&-
}

leave() {
  local code=$?
  trap - EXIT
  if flock -xn 9 && [ -e "$passing" ]; then
    rm -f "$passing"
    stop 9>&- || true
  fi
  exit "$code"
}

bring_up() {
  install_packet_filter
  if answers; then
    say "Docker Engine $(version) answers; nothing to do"
    return 0
  fi
  case ${DOCKER_HOST:-unix:///var/run/docker.sock} in
    unix:///var/run/docker.sock | unix:///run/docker.sock) ;;
    *) die "DOCKER_HOST is $DOCKER_HOST, and no engine answers there: start that engine, or unset DOCKER_HOST" ;;
  esac
  need_root "starting an engine" start
  if a_dockerd_runs && ! our_dockerd >/dev/null; then
    # Perhaps it is still starting, or it is ending. It is not ours: wait, and change nothing.
    say "a dockerd that is not ours is running; waiting for it to answer"
    if wait_until_it_answers other; then return 0; fi
    if a_dockerd_runs; then die "the dockerd that runs here does not answer on /var/run/docker.sock: look at its log"; fi
  fi
  mkdir -p "$dir"
  command -v dockerd >/dev/null && command -v docker >/dev/null || install_engine
  if has_systemd; then
    echo "systemd $boot" >"$mark"
    systemctl start docker.service || die "systemctl start docker failed: journalctl -u docker says why"
    wait_until_it_answers systemd || die "the docker service runs and does not answer: journalctl -u docker says why"
  else
    # The package's own start script may have started it already; then there is nothing of ours to stop later.
    if ! answers; then
      echo "dockerd $boot" >"$mark"
      our_dockerd >/dev/null || start_dockerd
      if ! wait_until_it_answers dockerd; then
        tail -n 15 "$log" >&2
        die "dockerd did not come up; the end of $log stands above"
      fi
    fi
  fi
  say "Docker Engine $(version) answers"
}

stop() {
  case $(started_by_us || true) in
    systemd)
      need_root "stopping the engine" stop
      systemctl stop docker.socket docker.service
      say "stopped the docker service"
      ;;
    dockerd)
      need_root "stopping the engine" stop
      local pid i
      if pid=$(our_dockerd); then
        kill -TERM "$pid"
        for ((i = 0; i < 120; i++)); do
          our_dockerd >/dev/null || break
          sleep 0.25
        done
        if our_dockerd >/dev/null; then die "dockerd (process $pid) did not end within 30 s"; fi
        say "stopped dockerd; its images stay in $dir/data"
      fi
      ;;
    *)
      say "no engine was started from here; nothing to do"
      return 0
      ;;
  esac
  rm -f "$mark" "$passing"
}

status() {
  local whose="started by something else"
  if started_by_us >/dev/null; then whose="started by engine.sh ($(started_by_us))"; fi
  if answers; then
    echo "Docker Engine $(version) answers; $whose"
  else
    echo "no engine answers"
    return 1
  fi
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  run)
    shift
    [ $# -gt 0 ] || die "run needs a command"
    run "$@"
    ;;
  status) status ;;
  *)
    sed -n '4,7s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
