#!/bin/sh
# Sees to what pip cannot bring: Mesa's software rendering, and a compiler and CMake for the ROS
# messages. Installs with apt when run as root, else prints the one command to run.
missing=""
for library in libEGL.so.1 libGL.so.1; do
  ldconfig -p | grep -q "$library" || missing="$missing libegl1 libgl1"
done
# the driver that draws without a GPU is loaded by libEGL, under a name that differs by version
driver=""
for file in /usr/lib/*/dri/swrast_dri.so /usr/lib/*/libgallium-*.so; do
  [ -e "$file" ] && driver=$file
done
[ -n "$driver" ] || missing="$missing libgl1-mesa-dri"
command -v cmake >/dev/null 2>&1 || missing="$missing cmake"
command -v c++ >/dev/null 2>&1 || missing="$missing g++"
[ -z "$missing" ] && exit 0
missing=$(printf '%s\n' $missing | sort -u | tr '\n' ' ')
if ! command -v apt-get >/dev/null 2>&1; then
  echo "pi05_ros needs these Debian packages or their like: $missing" >&2
  exit 1
fi
if [ "$(id -u)" != 0 ]; then
  echo "pi05_ros needs system packages. Run: sudo apt-get install -y $missing" >&2
  exit 1
fi
echo "installing $missing"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing; } >/dev/null
